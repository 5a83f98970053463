"""The rows of parquet and arrow files by number, through pyarrow. "Lines" are row numbers from 1.

Memory: of a parquet file one batch of rows (4 MiB) or one small row group (32 MiB), and while a
group is read, two to three of its largest pages (of some 1 MiB, or 1,024 values, as their writer
chose); of arrow files nothing, they are mapped. A large row group whose rows are asked for out of
order is written once to an unnamed temporary file, as arrow, and read from there. Refuses to know:
what a row means.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.records import DataError

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256
_GROUP_BYTES = 32 << 20  # row groups up to this size are kept whole
_READ_BYTES = 1 << 20


class _Held(NamedTuple):
    """Rows in memory: a table, and the number of its first row."""

    first: int
    table: Any

    def __contains__(self, i: object) -> bool:
        return isinstance(i, int) and self.first <= i < self.first + int(self.table.num_rows)

    def row(self, i: int) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self.table.slice(i - self.first, 1).to_pylist()[0])


class ParquetRows:
    """The rows of a parquet file by number."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            found = say("a parquet file", "parquet 文件")
            raise DataError(path, 0, "file", found, "package", {"name": "pyarrow"}) from error
        self.path, self._pa = path, pa
        try:
            self._file = pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
        except (ValueError, OSError) as error:
            raise _damaged(path, error) from error
        groups = [self._file.metadata.row_group(k) for k in range(self._file.num_row_groups)]
        self._ends = np.cumsum([0, *(group.num_rows for group in groups)])
        self._bytes = [int(group.total_byte_size) for group in groups]
        self._held = _Held(0, pa.table({}))
        self._coming: Iterator[_Held] = iter(())  # what follows the rows that are held, within their group
        self._spooled: dict[int, tuple[Any, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        if i not in self._held:
            k = int(np.searchsorted(self._ends, i, "right")) - 1
            try:
                self._held = self._find(k, i)
            except self._pa.ArrowException as error:
                raise _damaged(self.path, error) from error
        return self._held.row(i)

    def _find(self, k: int, i: int) -> _Held:
        """The rows around row i of group k: the next ones, the whole group if it is small, or from
        the temporary file.
        """
        first, follows = int(self._ends[k]), i == self._held.first + self._held.table.num_rows
        if follows and (held := next(self._coming, None)) is not None and i in held:
            return held
        self._held, self._coming = _Held(0, self._held.table.slice(0, 0)), iter(())  # they go before others come
        if self._bytes[k] <= _GROUP_BYTES and (whole := self._whole(k)) is not None:
            return _Held(first, whole)
        if i == first and k not in self._spooled:
            self._coming = self._batches(k)
            return next(self._coming)
        if k not in self._spooled:
            self._spooled[k] = self._spool(k)
        file, firsts = self._spooled[k]
        at = int(np.searchsorted(firsts, i, "right")) - 1
        return _Held(int(firsts[at]), self._pa.Table.from_batches([file.get_batch(at)]))

    def _batches(self, k: int) -> Iterator[_Held]:
        """The rows of a group in their order, some MiB of them at a time."""
        first = int(self._ends[k])
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * (int(self._ends[k + 1]) - first) // max(1, self._bytes[k])))
        for batch in self._file.iter_batches(batch_size=rows, row_groups=[k], use_threads=False):
            yield _Held(first, self._pa.Table.from_batches([batch]))
            first += batch.num_rows

    def _whole(self, k: int) -> Any | None:
        """A row group as one table; None where it is larger than its file says, such as one picture
        that stands in many rows.
        """
        held, size = [], 0
        for part in self._batches(k):
            held.append(part.table)
            size += int(part.table.get_total_buffer_size())
            if size > 2 * _GROUP_BYTES:
                self._bytes[k] = size * (int(self._ends[k + 1]) - int(self._ends[k])) // sum(t.num_rows for t in held)
                return None
        return self._pa.concat_tables(held)

    def _spool(self, k: int) -> tuple[Any, np.ndarray]:
        """A row group in a temporary file that goes with this process, and the first row of each
        batch in it. Raises DataError where it has no room.
        """
        place = tempfile.TemporaryFile()  # noqa: SIM115
        firsts = []
        try:
            with self._pa.ipc.new_file(place, self._file.schema_arrow) as out:
                for part in self._batches(k):
                    firsts.append(part.first)
                    for batch in part.table.to_batches():
                        out.write_batch(batch)
            place.flush()
        except OSError as error:
            params = {"folder": tempfile.gettempdir(), "why": str(error)}
            raise DataError(
                self.path,
                0,
                "file",
                say(f"a row group of {self._bytes[k] >> 20} MiB", f"{self._bytes[k] >> 20} MiB 的行组"),
                "spool",
                params,
            ) from error
        return self._pa.ipc.open_file(place), np.array(firsts)


class ArrowRows:
    """The rows of an arrow file, as `datasets.save_to_disk` writes them, mapped and not read."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise DataError(
                path, 0, "file", say("an arrow file", "arrow 文件"), "package", {"name": "pyarrow"}
            ) from error
        self.path = path
        try:
            with open(path, "rb") as file:
                is_file = file.read(6) == b"ARROW1"
            source = pa.memory_map(path)
            self._table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
        except (ValueError, OSError) as error:
            raise DataError(
                path, 0, "file", say("no arrow", "非 arrow"), "damaged", {"why": str(error).partition("\n")[0]}
            ) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self._table.slice(i, 1).to_pylist()[0])


def _damaged(path: str, error: Exception) -> DataError:
    return DataError(
        path, 0, "file", say("no parquet", "非 parquet"), "damaged", {"why": str(error).partition("\n")[0]}
    )

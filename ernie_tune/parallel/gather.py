"""The tensors of a model that lies over ranks, whole on rank 0, one at a time: each distinct part
travels once, from one of its holders.

Every rank calls `get` with the same names in the same order; or rank 0 leads (`leading`, `ask`) and
the others `follow`.
Refuses to know: names' meaning, files, which parts there are (the caller says where each lies).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from ernie_tune.parallel.mesh import Group

# What save routines ask for twice in turn: the two stacks of a layer's experts, expert by expert.
_REMEMBERED = 2


class Block(Protocol):
    """A rectangular block of a tensor of shape `whole`."""

    @property
    def whole(self) -> tuple[int, ...]: ...

    @property
    def offset(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Gathered:
    """`held`: this rank's parameters by global name, and the block that each is. A collective: all
    ranks make one together.
    """

    def __init__(self, held: Mapping[str, tuple[Block, Tensor]], group: Group) -> None:
        self.held, self.group = held, group
        said = group.objects(
            {name: (b.whole, b.offset, b.shape, str(t.dtype).rsplit(".", 1)[-1]) for name, (b, t) in held.items()}
        )
        self.sources: dict[str, list[tuple[int, Any]]] = {}
        for rank, blocks in enumerate(said):
            for name, block in blocks.items():
                known = self.sources.setdefault(name, [])
                if math.prod(block[2]) and block not in [b for _, b in known]:
                    known.append((rank, block))
        self._last: dict[str, np.ndarray] = {}

    def get(self, name: str) -> np.ndarray | None:
        """The whole tensor on rank 0, None elsewhere; bfloat16 as its bits. Raises KeyError for a
        name that no rank has.
        """
        first = self.group.rank == 0
        out: np.ndarray | None = None
        for rank, (whole, offset, shape, dtype) in self.sources[name]:
            if self.group.rank == rank and not first:
                dist.send(self.held[name][1].detach().contiguous(), dst=self.group.ranks[0], group=self.group.fleet)
            if not first:
                continue
            part = self.held[name][1].detach() if rank == 0 else paddle.empty(list(shape), dtype)
            if rank != 0:
                dist.recv(part, src=self.group.ranks[rank], group=self.group.fleet)
            values = part.numpy()
            out = np.empty(whole, values.dtype) if out is None else out
            out[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = values
        return out

    def kind(self, name: str) -> str:
        """The name of a tensor's type."""
        return str(self.sources[name][0][1][3])

    def ask(self, name: str) -> tuple[np.ndarray, str]:
        """On rank 0, while leading: the whole tensor and the name of its type."""
        if name not in self._last:
            while len(self._last) >= _REMEMBERED:
                del self._last[next(iter(self._last))]
            self.group.objects(name)
            value = self.get(name)
            if value is None:
                raise AssertionError("rank 0 leads")
            self._last[name] = value
        return self._last[name], self.kind(name)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0's side: inside, `ask` for what is needed; whatever happens, the others are told
        the end.
        """
        try:
            yield
        finally:
            self.group.objects(None)

    def follow(self) -> None:
        """The other ranks' side: hand over what is asked for, until the end."""
        while (name := self.group.objects(None)[0]) is not None:
            self.get(name)

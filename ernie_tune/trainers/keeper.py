"""What a run keeps: named parts, all saved into a checkpoint and put back from one in the same way,
whatever they are.

Refuses to know: what the parts mean, when is saved, where checkpoints lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ernie_tune.checkpoint.state import Checkpoint, on_all_ranks, write_json
from ernie_tune.config.language import say
from ernie_tune.data.batching import BatchStream, dealt_again
from ernie_tune.machine.place import Place
from ernie_tune.trainers.method import Stateful


class HasState(Protocol):
    """Anything whose state is JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Keeper:
    """The parts of a run by name, in the order in which they are saved and put back."""

    def __init__(self, place: Place, parts: Mapping[str, Stateful]) -> None:
        self.place, self.parts = place, dict(parts)

    def save(self, folder: Path) -> None:
        """Write every part. All ranks call it, and all raise the OSError of any."""
        for part in self.parts.values():
            on_all_ranks(self.place, lambda part=part: part.save(folder))  # type: ignore[misc]

    def load(self, checkpoint: Checkpoint) -> None:
        """Put every part back. Raises ValueError naming the part that the checkpoint does not have,
        or that is another run's."""
        for name, part in self.parts.items():
            try:
                part.load(checkpoint.path)
            except FileNotFoundError as error:
                raise ValueError(
                    say(
                        f"{checkpoint.path} must hold {Path(error.filename or name).name} for {name}; it was "
                        "saved by another release or stage, start anew from its weights: resume_only_model: true "
                        "and another output_dir",
                        f"{checkpoint.path} 中须有 {name} 的 {Path(error.filename or name).name}"
                        "；它由其他版本或阶段保存，请以其权重重新开始：resume_only_model: true，并换一个 "
                        "output_dir",
                    )
                ) from error


class JsonPart:
    """A part whose state is the same on every rank: one JSON file, written by one of them."""

    def __init__(self, place: Place, file: str, held: HasState) -> None:
        self.place, self.file, self.held = place, file, held

    def save(self, folder: Path) -> None:
        if self.place.is_writer:
            write_json(folder / self.file, self.held.state_dict())

    def load(self, folder: Path) -> None:
        self.held.load_state_dict(Checkpoint(folder, 0).read_json(self.file))


class StreamPart:
    """Where the rows stand: one JSON file for each rank that reads different rows; under another
    number of such ranks, what all had still to read is dealt out again."""

    def __init__(self, place: Place, stream: BatchStream, file: str = "data_state.json") -> None:
        self.place, self.stream, self.file = place, stream, file

    def save(self, folder: Path) -> None:
        states = dict(self.place.gather((self.place.batch[0], self.stream.state_dict())))
        for rank, state in states.items() if self.place.is_writer else ():
            write_json(folder / self._name(rank), state)

    def load(self, folder: Path) -> None:
        self.stream.load_state_dict(self.state_in(folder))

    def state_in(self, folder: Path) -> dict[str, Any]:
        """What this rank goes on from."""
        rank, size = self.place.batch
        count, checkpoint = len(list(folder.glob(f"*_{self.file}"))) + 1, Checkpoint(folder, 0)
        if count == size:
            return checkpoint.read_json(self._name(rank))
        return dealt_again([checkpoint.read_json(self._name(other)) for other in range(count)], rank, size)

    def _name(self, rank: int) -> str:
        return f"{rank}_{self.file}" if rank else self.file

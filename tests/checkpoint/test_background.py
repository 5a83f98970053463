"""Checkpoints written while training goes on: the bytes of a plain one, as things were when it was
asked for; errors on every rank; nothing half.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.thread_ranks import ThreadRanks, on_ranks
from support.tiny_runs import checkpoints, history, same_bytes, train

from ernie_tune.checkpoint import background
from ernie_tune.checkpoint.background import Pending, save_in_background
from ernie_tune.checkpoint.state import Checkpoint, complete_checkpoints, load_values
from ernie_tune.train.optim import build_adamw


def trained(value: float) -> tuple[dict[str, paddle.Tensor], paddle.optimizer.AdamW]:
    layer = paddle.nn.Layer()
    named = {"norm.weight": layer.create_parameter([3]), "lm_head.weight": layer.create_parameter([2, 2])}
    for p in named.values():
        p.set_value(paddle.full_like(p, value))
    adamw = build_adamw(list(named.items()), lambda _: 1.0, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8)
    return named, adamw


def model_file(folder: Path) -> None:
    (folder / "weights").write_text("w", encoding="utf-8")


def begin(folder: Path, step: int = 3, **more: Any) -> tuple[Pending, dict[str, paddle.Tensor]]:
    named, optimizer = trained(1.0)
    save_model: Callable[[Path], object] = more.pop("save_model", model_file)
    return save_in_background(folder, step, save_model, optimizer, named, {"a.json": {"b": 1}}, {}, **more), named


def test_a_run_leaves_the_same_checkpoints_and_goes_on_alike(tmp_path: Path) -> None:
    runs = {}
    for kind in (False, True):
        (tmp_path / str(kind)).mkdir()
        runs[kind] = train(tmp_path / str(kind), save_steps=2, save_total_limit=2, async_save=kind, max_steps=6)
    assert checkpoints(runs[True]) == checkpoints(runs[False]) == ["checkpoint-4", "checkpoint-6"]
    assert history(runs[True]) == history(runs[False])
    for name in checkpoints(runs[True]):
        differ = (
            "trainer_state.json",
            "loop_state.json",
            "ernie_tune_args.yaml",
            "checkpoint_files.json",
            "ledger.json",
        )  # clocks, folders, the setting
        assert "optimizer/rank-00000.safetensors" in same_bytes(runs[True] / name, runs[False] / name, but=differ)


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), background.write_rank
    monkeypatch.setattr(background, "write_rank", lambda *args: (gate.wait(20), write(*args))[1])
    pending, named = begin(tmp_path)
    assert complete_checkpoints(tmp_path) == [], "not there before it is complete"
    for p in named.values():
        p.set_value(p * 99)
    gate.set()
    assert pending.wait() == Checkpoint(tmp_path / "checkpoint-3", 3)
    again, _ = trained(5.0)
    load_values(Checkpoint(tmp_path / "checkpoint-3", 3), again)
    assert all(np.array_equal(p.numpy(), np.ones(p.shape, np.float32)) for p in again.values())
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_full_disk_comes_out_at_the_next_save_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, 2)[0].wait()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background, "write_rank", full)
    pending, _ = begin(tmp_path, 4)
    with pytest.raises(
        OSError, match=r"checkpoint-4 could not be saved \(No space left on device\); older checkpoints are"
    ):
        pending.wait()
    assert [c.step for c in complete_checkpoints(tmp_path)] == [2]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("broken", [None, 0, 1])
def test_ranks_finish_together_or_fail_together(
    broken: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = background.write_rank

    def write_or_not(folder: Path, rank: int, slices: Any) -> Any:
        if rank == broken:
            raise OSError(28, "No space left on device")
        return write(folder, rank, slices)

    monkeypatch.setattr(background, "write_rank", write_or_not)

    def save(ranks: ThreadRanks) -> int:
        save_model = model_file if ranks.rank == 0 else lambda _: None
        pending, _ = begin(tmp_path, ranks=ranks, save_model=save_model)
        ranks.turn.release()  # the other rank's turn: this one's thread waits for its part
        pending.thread.join(20)
        ranks.turn.acquire()
        return pending.wait().step

    said = on_ranks(2, save)
    if broken is None:
        assert said == [3, 3]
        again, _ = trained(5.0)
        load_values(Checkpoint(tmp_path / "checkpoint-3", 3), again)
        assert again["norm.weight"].tolist() == [1.0, 1.0, 1.0]
    else:
        assert all("checkpoint-3 could not be saved (rank 0: " in str(error) for error in said), said
        assert broken == 0 or all("rank 1: No space left on device" in str(error) for error in said)
        assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PATIENCE_SECONDS", 0.2)
    first = type("First", (), {"rank": 0, "size": 2, "gather": staticmethod(lambda value: [value])})()
    pending, _ = begin(tmp_path, ranks=first)
    with pytest.raises(OSError, match=r"rank 0: rank 1 has not written its part for 0\.2 s"):
        pending.wait()
    assert list(tmp_path.iterdir()) == []

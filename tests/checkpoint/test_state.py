"""checkpoint/state.py: checkpoints are complete or absent, found, kept and deleted by rule, and
refused where they are others'.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_tune.checkpoint.state import (
    SIGNAL,
    complete_checkpoints,
    find_checkpoint,
    load_optimizer,
    load_values,
    read_values,
    remove_unfinished,
    rotate,
    save_checkpoint,
    set_aside_later,
    write_values,
)
from ernie_tune.train.optim import build_adamw


def complete(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / SIGNAL).write_text("1", encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- finding --------------------------------------------------------------------------------------


def test_only_complete_checkpoints_are_found_by_number_not_by_name(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "nowhere") == []
    assert find_checkpoint(tmp_path, "auto") is None
    complete(tmp_path, 9, 100, 20)
    (tmp_path / "checkpoint-200").mkdir()  # no mark
    (tmp_path / "checkpoint-300.tmp").mkdir()
    complete(tmp_path / "checkpoint-best", 1)
    assert [c.step for c in complete_checkpoints(tmp_path)] == [9, 20, 100]
    found = find_checkpoint(tmp_path, "auto")
    assert found is not None
    assert (found.path, found.step) == (tmp_path / "checkpoint-100", 100)
    assert find_checkpoint(tmp_path, "no") is None
    named = find_checkpoint(Path("elsewhere"), str(tmp_path / "checkpoint-9"))
    assert named is not None
    assert named.step == 9


@pytest.mark.parametrize("name", ["checkpoint-200", "checkpoint-best", "nothing"])
def test_a_named_folder_must_be_a_complete_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-200").mkdir()
    complete(tmp_path / "checkpoint-best", 1)
    with pytest.raises(
        ValueError, match=rf"resume_from_checkpoint \(.*{name}\) must be a complete checkpoint-N folder"
    ):
        find_checkpoint(tmp_path, str(tmp_path / name))


# --- keeping --------------------------------------------------------------------------------------


def test_rotation_spares_the_best_and_the_newest(tmp_path: Path) -> None:
    complete(tmp_path, 1, 2, 3, 4, 5)
    assert rotate(tmp_path, None, tmp_path) == []
    removed = rotate(tmp_path, 3, tmp_path / "checkpoint-1")
    assert [p.name for p in removed] == ["checkpoint-2", "checkpoint-3"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    rotate(tmp_path, 1, tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5"], "one more than the limit, where best and newest differ"
    rotate(tmp_path, 1, tmp_path / "checkpoint-5")
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_deletion_that_is_cut_short_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path, 1, 2)

    def killed(path: Path) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("ernie_tune.checkpoint.state.shutil.rmtree", killed)
        with pytest.raises(SystemExit):
            rotate(tmp_path, 1)
    assert [c.step for c in complete_checkpoints(tmp_path)] == [2]
    (tmp_path / "checkpoint-final.tmp").mkdir()  # not ours
    assert [p.name for p in remove_unfinished(tmp_path)] == ["checkpoint-1.tmp"]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-final.tmp"]


def test_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    complete(tmp_path, 2, 4, 6)
    (tmp_path / "checkpoint-6.old").mkdir()
    assert [p.name for p in set_aside_later(tmp_path, 2)] == ["checkpoint-4.old", "checkpoint-6.old"]
    assert [c.step for c in complete_checkpoints(tmp_path)] == [2]
    assert (tmp_path / "checkpoint-6.old" / SIGNAL).is_file()
    assert set_aside_later(tmp_path, 2) == []


# --- saving and loading ---------------------------------------------------------------------------


def trained(value: float = 1.0) -> tuple[dict[str, paddle.Tensor], paddle.optimizer.AdamW]:
    layer = paddle.nn.Layer()
    named = {"norm.weight": layer.create_parameter([3]), "lm_head.weight": layer.create_parameter([2, 2])}
    for p in named.values():
        p.set_value(paddle.full_like(p, value))
    optimizer = build_adamw(list(named.items()), lambda _: 1.0, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8)
    return named, optimizer


def save(folder: Path, step: int = 3, model: Any = None, with_optimizer: bool = True) -> dict[str, paddle.Tensor]:
    named, optimizer = trained()
    (named["norm.weight"].sum() * 3 + named["lm_head.weight"].sum()).backward()
    optimizer.set_lr(0.1)
    optimizer.step()
    write = model or (lambda path: (path / "weights").write_text("w", encoding="utf-8"))
    states, texts = {"data.json": {"position": 7, "名": 0.1 + 0.2}}, {"args.yaml": "a: 1\n"}
    made = save_checkpoint(folder, step, write, optimizer if with_optimizer else None, named, states, texts)
    assert made == find_checkpoint(folder, "auto")
    assert made.read_json("data.json") == {"position": 7, "名": 0.30000000000000004}
    return named


def test_a_checkpoint_holds_everything_and_loads_bit_for_bit(tmp_path: Path) -> None:
    named = save(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]
    assert names(tmp_path / "checkpoint-3") == [
        "args.yaml",
        "checkpoint_files.json",
        "data.json",
        "optimizer",
        SIGNAL,
        "weights",
    ]
    found = find_checkpoint(tmp_path, "auto")
    assert found is not None
    again, optimizer = trained(5.0)
    load_optimizer(found, optimizer, again)
    for name, p in named.items():
        assert again[name].numpy().tobytes() == p.numpy().tobytes()
    moment = optimizer._get_accumulator_master("moment1", again["norm.weight"])
    np.testing.assert_allclose(moment.numpy(), [0.3, 0.3, 0.3], rtol=1e-6)  # (1 - beta1) * gradient
    named, _ = trained(5.0)
    load_values(found, named)
    assert named["norm.weight"].tolist() == again["norm.weight"].tolist()


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "checkpoint-3" / "stale").touch()
    save(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]
    assert "stale" not in names(tmp_path / "checkpoint-3")


def test_without_an_optimizer_there_is_nothing_to_resume(tmp_path: Path) -> None:
    save(tmp_path, with_optimizer=False)
    found = find_checkpoint(tmp_path, "auto")
    assert found is not None
    named, optimizer = trained()
    with pytest.raises(ValueError, match=r"checkpoint-3 must hold optimizer/ to resume, .* resume_only_model: true"):
        load_optimizer(found, optimizer, named)


def test_parameters_of_another_run_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    found = find_checkpoint(tmp_path, "auto")
    assert found is not None
    named, _ = trained()
    wide = paddle.nn.Layer().create_parameter([2, 4])
    for other in (
        {"lm_head.weight": named["lm_head.weight"]},  # fewer
        {**named, "embed_tokens.weight": wide},  # more
        {**named, "lm_head.weight": wide},  # of another shape
    ):
        with pytest.raises(
            ValueError, match=r"parameters that .*checkpoint-3 holds \(2\) must be those .* differ, first"
        ):
            load_values(found, other)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("odd"), KeyboardInterrupt()]
)
def test_a_save_that_fails_leaves_no_trace(error: BaseException, tmp_path: Path) -> None:
    save(tmp_path, step=2)
    before = json.loads((tmp_path / "checkpoint-2" / "data.json").read_text(encoding="utf-8"))

    def fail(path: Path) -> None:
        (path / "half").write_text("half", encoding="utf-8")
        path.with_name(path.name + ".tmp").mkdir()  # as the writers of weights do
        raise error

    with pytest.raises(type(error)) as caught:
        save(tmp_path, step=4, model=fail)
    assert names(tmp_path) == ["checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-2" / "data.json").read_text(encoding="utf-8")) == before
    if isinstance(error, OSError):
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == error.errno
        why = "No space left on device" if error.errno else "odd"
        assert f"checkpoint-4 could not be saved ({why}); older checkpoints are as they were" in str(caught.value)


def test_what_a_kill_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3.tmp" / "new" / "optimizer").mkdir(parents=True)
    save(tmp_path)
    assert names(tmp_path) == ["checkpoint-3"]


def test_tensors_beside_the_optimizers_are_written_whole_and_a_failure_is_said(tmp_path: Path) -> None:
    value = paddle.arange(6, dtype="float32").reshape([2, 3])
    write_values(tmp_path / "kept", {"a.weight": value})
    found = paddle.zeros([2, 3])
    read_values(tmp_path / "kept", {"a.weight": found})
    assert np.array_equal(found.numpy(), value.numpy())
    with pytest.raises(OSError, match="No such file"):
        write_values(tmp_path / "nowhere" / "kept", {"a.weight": value})

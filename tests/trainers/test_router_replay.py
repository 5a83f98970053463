"""Routers that choose again what they chose while answers were sampled: what a run notes, counts
and resumes; where it is refused.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.online_runs import even, sampled_run
from support.tiny_runs import processor
from test_online import rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.models.replay import COLUMN, UNKNOWN
from ernie_tune.train.rolled import Rolled
from ernie_tune.train.rollouts import Rollouts
from ernie_tune.trainers.online import RLVRTrainer


def trainer(folder: Path, given: Any = None, **changes: Any) -> RLVRTrainer:
    file = folder / "ask.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(6)), encoding="utf-8")
    small = {"max_steps": 2, "num_mini_batches": 2, "learning_rate": 1e-2}
    settings = sampled_run(file, folder / "run", **{**small, **changes})
    return RLVRTrainer(given or AutoModel.from_config("tiny-a"), settings, processor=processor(), reward_funcs=even)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Rolled]:
    """All groups that a run makes."""
    seen: list[Rolled] = []
    make = Rollouts.make_round

    def watched(self: Rollouts) -> list[Rolled]:
        found = make(self)
        seen.extend(found)
        return found

    monkeypatch.setattr(Rollouts, "make_round", watched)
    return seen


def test_sampling_and_the_trainer_note_the_same(tmp_path: Path, rounds: list[Rolled]) -> None:
    """R3 by default with two updates a round; R2 notes the same in a pass of its own. The first
    update flips nothing, a large step may.
    """
    made = trainer(tmp_path)
    made.train()
    sampled = [group.columns[COLUMN] for group in rounds]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    flips = [row["mismatch/routing_flips"] for row in state["log_history"] if "loss" in row]
    assert flips[0] == 0
    assert len(flips) == 2
    rounds.clear()
    trainer(tmp_path, router_replay="R2", output_dir=str(tmp_path / "r2")).train()
    assert len(rounds) == len(sampled) == 4
    for group, noted in zip(rounds, sampled, strict=True):
        own, read = group.columns[COLUMN], (noted != UNKNOWN).all((1, 2))
        assert (own >= 0).all()
        assert (~read).sum() == 3, "of each answer the last token, which nobody read"
        np.testing.assert_array_equal(np.sort(own[read], -1), np.sort(noted[read], -1))


def test_what_is_left_of_a_round_keeps_its_notes(tmp_path: Path, rounds: list[Rolled]) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.train()
    kept = made.method.rollouts  # type: ignore[attr-defined]
    kept.save(tmp_path / "kept")
    before = {group.number: group.columns[COLUMN] for group in kept._groups_at.values()}
    kept.load(tmp_path / "kept")
    after = {group.number: group.columns[COLUMN] for group in kept._groups_at.values()}
    assert after
    for number, noted in after.items():
        np.testing.assert_array_equal(noted, before[number])


def test_off_and_refused(tmp_path: Path, rounds: list[Rolled]) -> None:
    trainer(tmp_path, max_steps=1, num_mini_batches=1).train()  # one update a round: nothing to replay
    trainer(tmp_path, max_steps=1, router_replay="off", output_dir=str(tmp_path / "off")).train()
    assert rounds
    assert all(COLUMN not in group.columns for group in rounds)
    dense = ErnieModel(dataclasses.replace(preset("tiny-a"), moe=None))
    with pytest.raises(ValueError, match=r"router_replay \(R3\) must be off with a model without routers"):
        trainer(tmp_path, dense, router_replay="R3")
    with pytest.raises(ValueError, match=r"router_replay \(R2\) must be off with virtual tokens"):
        trainer(tmp_path, router_replay="R2", fine_tuning="Prompt")

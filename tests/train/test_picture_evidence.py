"""Rewards for looking: twins in the same round, log-probabilities without the picture and without a
box, and the patches that are hidden for them. Models are real, log-probabilities also invented.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import GOLDEN
from PIL import Image
from support.tiny_runs import processor

from ernie_tune.data.processor import Encoded
from ernie_tune.data.prompts import PromptStream
from ernie_tune.data.records import Meta, Record, Reward
from ernie_tune.data.units import UnitBatch
from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.scheduler import Capacity, complete
from ernie_tune.machine.stages import frozen_outputs
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.objectives.objective import logp_outputs
from ernie_tune.rewards.functions import RewardFunction
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.evidence import (
    Evidence,
    EvidenceSettings,
    answer_start,
    blind_ceiling,
    cited_box,
    control_of,
    greyed,
    some_hidden,
    touched,
    twin_of,
    without_picture,
)
from ernie_tune.train.rollouts import Rolled, Rollouts, RolloutSettings

PROCESSOR = processor()
S = RolloutSettings(prompts=4, num_generations=3, max_completion_length=3, dynamic_sample=False)
ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))["outputs"]["evidence"]


def rows(folder: Path, count: int = 4, answers: str = "ab") -> list[Record]:
    """Pictures in one colour, with twins in another."""
    out = []
    for i in range(count):
        for mark in ("", "t", "c"):
            colour = (250, 20, 20) if mark != "t" else (20, 20, 250)
            Image.new("RGB", (112, 56), colour).save(folder / f"{i}{mark}.png")
        scene = {
            "twin": {"images": [f"{i}t.png"], "answer": answers[1], "objects": []},
            "control": {"images": [f"{i}c.png"]},
        }
        out.append(
            Record(
                "verifiable",
                ({"role": "user", "content": f"<image>colour {i}"},),
                (str(folder / f"{i}.png"),),
                reward=Reward(answers[0], scene=scene),
                meta=Meta(str(folder / "rows.jsonl"), i + 1),
            )
        )
    return out


def encode_prompt(words: str, picture: Any) -> Encoded:
    picture = str(picture) if isinstance(picture, Path) else picture
    return PROCESSOR.encode([{"role": "user", "content": words}], [picture], add_generation_prompt=True)


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    paddle.seed(5)
    return ErnieModel(preset("tiny-a"))


def made(model: ErnieModel, rows: Sequence[Record], settings: EvidenceSettings, reward: Any, **more: Any) -> Rollouts:
    engine = Engine(model, PROCESSOR)
    banned = PROCESSOR.tokens.placeholders() + PROCESSOR.tokens.markers()

    def support(model: Any, hidden: Any, batch: Any) -> Any:
        return logp_outputs(model, hidden, batch, banned=banned)

    def logp(batch: UnitBatch) -> np.ndarray:
        return frozen_outputs(model, support, batch)["logp_N"]

    evidence = Evidence(settings, rows, PROCESSOR, more.pop("logp", logp))
    sample = lambda prompts: dict(complete(engine.scheduler(Capacity(rows=64)), prompts))  # noqa: E731
    rubric = Rubric([RewardFunction(reward)], check=False)
    return Rollouts(
        more.pop("rounds", S),
        rows,
        PROCESSOR,
        more.pop("sampler", sample),
        rubric,
        prompts=PromptStream(len(rows), 1),
        evidence=evidence,
        **more,
    )


# --- rows -----------------------------------------------------------------------------------------


def test_twins_and_controls_of_rows(tmp_path: Path) -> None:
    (record,) = rows(tmp_path, 1)
    twin, control = twin_of(record), control_of(record)
    assert twin is not None
    assert control is not None
    assert (twin.images, twin.reward.answer) == ((str(tmp_path / "0t.png"),), "b")  # type: ignore[union-attr]
    assert twin.reward is not None
    assert twin.reward.scene == {"objects": []}
    assert control.images == (str(tmp_path / "0c.png"),)
    assert control.reward == record.reward
    assert twin_of(twin) is None
    same = dataclasses.replace(record, reward=Reward("a", scene={"twin": {"images": ["x.png"], "answer": "a"}}))
    with pytest.raises(ValueError, match=r"rows.jsonl:1: scene.twin must have images and an answer other than 'a'"):
        twin_of(same)
    with pytest.raises(ValueError, match=r"evidence_twins \(true\) must have rows with scene.twin"):
        Evidence(
            EvidenceSettings(twins=True),
            [control_of(record) and dataclasses.replace(record, reward=Reward("a"))],
            PROCESSOR,
            np.zeros_like,
        )  # type: ignore[list-item]


def test_what_can_be_known_without_looking(tmp_path: Path) -> None:
    """Four questions, each with answers a and b to two pictures: half are right by chance, and
    chance itself earns .5 (.5 + .5 .5) of twins."""
    evidence = Evidence(EvidenceSettings(twins=True), rows(tmp_path), PROCESSOR, np.zeros_like)
    assert evidence.blind_ceiling() == (0.5, pytest.approx(0.375))
    plain = [Record("verifiable", ({"role": "user", "content": "?"},), ("x",), reward=Reward(a)) for a in "aab"]
    assert blind_ceiling(plain) == (pytest.approx(2 / 3), 0.0)
    assert blind_ceiling([dataclasses.replace(one, images=()) for one in plain]) == (0.0, 0.0)


def test_grey_pictures_keep_their_place(tmp_path: Path) -> None:
    (record,) = rows(tmp_path, 1)
    words, grey_one = record.prompt[0]["content"], without_picture(record)
    seen, grey = encode_prompt(words, record.images[0]), encode_prompt(words, grey_one.images[0])
    assert np.array_equal(seen.row.input_ids_L, grey.row.input_ids_L)
    assert np.abs(grey.row.pixel_values_PC).max() < 0.02  # type: ignore[arg-type]
    assert not greyed(seen).row.pixel_values_PC.any()  # type: ignore[union-attr]


# --- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("box", "wanted"), [
    ((0, 0, 112, 56), [(x, y) for x in range(8) for y in range(4)]),
    ((0, 0, 14, 14), [(0, 0)]),
    ((13, 13, 15, 15), [(0, 0), (1, 0), (0, 1), (1, 1)]),
    ((98, 42, 112, 56), [(7, 3)]),
    ((200, 200, 300, 300), []),
])  # fmt: skip
def test_patches_that_a_box_touches(tmp_path: Path, box: Any, wanted: list[tuple[int, int]]) -> None:
    """Against the pixels themselves: painted where the box is, what has changed is what it
    touches."""
    plain, painted = Image.new("RGB", (112, 56), "white"), Image.new("RGB", (112, 56), "white")
    for x, y in wanted:
        painted.paste((0, 0, 0), (14 * x, 14 * y, 14 * x + 14, 14 * y + 14))
    encoded = []
    for name, image in (("plain", plain), ("painted", painted)):
        image.save(tmp_path / f"{name}.png")
        encoded.append(encode_prompt("<image>?", tmp_path / f"{name}.png"))
    changed = (encoded[0].row.pixel_values_PC != encoded[1].row.pixel_values_PC).any(1)  # type: ignore[union-attr]
    assert touched(encoded[0], tuple(map(float, box)), (112, 56)).tolist() == changed.tolist()  # type: ignore[arg-type]


def test_hidden_patches_come_in_visual_tokens(tmp_path: Path) -> None:
    (record,) = rows(tmp_path, 1)
    encoded = encode_prompt(record.prompt[0]["content"], record.images[0])
    hidden = some_hidden(encoded, 0.6, 1, 2)
    assert len(hidden) == 32
    assert hidden.sum() == 4 * round(0.6 * 8)
    assert all(len(set(block)) == 1 for block in hidden.reshape(-1, 4).tolist())
    assert hidden.tolist() == some_hidden(encoded, 0.6, 1, 2).tolist()
    assert hidden.tolist() != some_hidden(encoded, 0.6, 1, 3).tolist()


def test_boxes_are_cited_in_evidence_alone() -> None:
    block = '<evidence>[{"type": "exists"}, {"type": "bbox", "box": [1, 2, 3, 4]}]</evidence>x'
    assert cited_box(block) == (1.0, 2.0, 3.0, 4.0)
    for text in ("[1, 2, 3, 4]", block * 2, block.replace("[1, 2, 3, 4]", "[3, 2, 1, 4]"), block.replace("4]", "NaN]")):
        assert cited_box(text) is None


# --- rounds ---------------------------------------------------------------------------------------


def of_number(groups: Sequence[Rolled]) -> dict[int, Rolled]:
    return {group.number: group for group in groups}


def test_twins_are_answered_in_one_round_and_paid_together(tmp_path: Path, model: ErnieModel) -> None:
    """Reward (share + (1 - share) mean of the twin's answers) of what an answer earned: the
    oracle's four cases, through a round."""

    def first(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        return [float(ids[0] % 2 == 0) if a == "a" else 1.0 for ids, a in zip(completion_ids, answer, strict=True)]

    found = made(model, rows(tmp_path), EvidenceSettings(twins=True), first)
    groups = of_number(found.make_round())
    assert len(groups) == 4
    originals = sorted(number for number in groups if number < 4)
    assert sorted(groups) == originals + [number + 4 for number in originals]
    for number in originals:
        group, twin = groups[number], groups[number + 4]
        right = np.array([float(a.token_ids[0] % 2 == 0) for a in group.answers])
        np.testing.assert_allclose(group.reward_G, right)  # the twin's answers are all right
        np.testing.assert_allclose(twin.reward_G, 0.5 + 0.5 * right.mean())
        np.testing.assert_array_equal(group.unit.score_C, group.reward_G)
    both = np.mean([groups[n].right_G.mean() for n in originals])
    assert found.metrics["evidence/twin_both_right"] == pytest.approx(both)


def test_what_is_told_of_a_round_is_of_its_refills_too(tmp_path: Path, model: ErnieModel) -> None:
    """All of the first two pairs are right, none of those drawn again since no answers differ."""
    judged = [0]

    def at_first(completions: list[Any], **_: Any) -> list[float]:
        judged[0] += len(completions)
        return [float(judged[0] <= S.prompts * S.num_generations)] * len(completions)

    rounds = dataclasses.replace(S, dynamic_sample=True, max_resample_times=1)
    found = made(model, rows(tmp_path), EvidenceSettings(twins=True), at_first, rounds=rounds)
    found.make_round()
    assert judged[0] == 2 * S.prompts * S.num_generations
    assert found.metrics["evidence/twin_both_right"] == 0.5


def test_an_answer_that_never_changes_earns_half(tmp_path: Path, model: ErnieModel) -> None:
    """The policy that does not look: always right here, never there."""
    constant = lambda answer, **_: [float(a == "a") for a in answer]  # noqa: E731
    groups = made(model, rows(tmp_path), EvidenceSettings(twins=True), constant).make_round()
    for group in groups:
        assert set(group.reward_G) == {ORACLE["d2_only_original"] if group.number < 4 else ORACLE["d2_none"]}


def test_dependence_is_paid_to_right_answers_alone(tmp_path: Path, model: ErnieModel) -> None:
    def first(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] % 2 == 0) for ids in completion_ids]

    plain = of_number(made(model, rows(tmp_path), EvidenceSettings(), first).make_round())

    def blind(batch: UnitBatch) -> np.ndarray:
        """Two nats less likely in the first half of each answer's tokens."""
        return np.concatenate([np.where(np.arange(n) < n / 2, -9.0, -5.0) for n in batch.length_C])

    settings = EvidenceSettings(dependence=0.5, scale=4.0, mask_ratio=1.0)
    found = made(model, rows(tmp_path), settings, first, logp=blind)
    for number, group in of_number(found.make_round()).items():
        gained = group.reward_G - plain[number].reward_G
        ends = np.cumsum(group.length_G)[:-1]
        for i, seen in enumerate(np.split(group.columns["old_logp_N"], ends)):
            without = np.where(np.arange(len(seen)) < len(seen) / 2, -9.0, -5.0)
            wanted = 0.5 * np.clip(np.mean(seen - without) / 4.0, 0, 1) if group.right_G[i] >= 1 else 0.0
            assert gained[i] == pytest.approx(wanted)
    assert {0.0, 1.0} <= {right for group in plain.values() for right in group.right_G}
    assert found.metrics["evidence/image_delta"] != 0


def test_log_probabilities_without_the_picture_are_the_models(tmp_path: Path, model: ErnieModel) -> None:
    """Hidden by the method, and encoded from a grey file: one number."""
    groups = made(
        model, rows(tmp_path), EvidenceSettings(), lambda completions, **_: [1.0] * len(completions)
    ).make_round()
    found = made(model, rows(tmp_path), EvidenceSettings(dependence=1.0, mask_ratio=1.0), lambda **_: [])
    assert found.evidence is not None
    unit = groups[0].unit
    inside = found.evidence._logps(
        [dataclasses.replace(unit, dialogues=tuple(greyed(d) for d in unit.dialogues))], groups, found.ranks
    )[0]
    grey = PROCESSOR.encode(
        groups[0].record.prompt, list(without_picture(groups[0].record).images), add_generation_prompt=True
    )
    assert grey.row.pixel_values_PC is not None
    grey.row.pixel_values_PC[:] = 0
    dialogue = grey.extended(groups[0].answers[1].token_ids)
    dialogue.trained_L[: grey.num_tokens] = False
    outside = found.evidence._logps([dataclasses.replace(unit, dialogues=(dialogue,), shared=0)], groups, found.ranks)[
        0
    ]
    np.testing.assert_allclose(inside[1], outside[0], atol=2e-6)
    whole = found.evidence._logps([unit], groups, found.ranks)[0]
    seen = np.split(groups[0].columns["old_logp_N"], np.cumsum(groups[0].length_G)[:-1])
    np.testing.assert_allclose(whole[1], seen[1], atol=1e-5)


def scripted(text: str) -> Any:
    """A sampler that gives every prompt one text, with log-probabilities of -0.1."""
    ids = [*PROCESSOR.tokenizer.encode(text), PROCESSOR.stop_ids[0]]

    def sample(prompts: Sequence[Prompt]) -> dict[int, list[Completion]]:
        one = Completion(ids, [-0.1] * len(ids), "stop", [True] * len(ids))
        return {prompt.key: [one] * prompt.params.n for prompt in prompts}

    return sample


@pytest.mark.parametrize(("name", "box", "without", "only", "wanted"), [
    ("good", [0, 0, 28, 17.92], -2.3, -0.2, ORACLE["d4_good"]),
    ("wrong place", [84, 0, 112, 17.92], -0.15, -2.4, ORACLE["d4_wrong_place"]),
    ("whole picture", [0, 0, 112, 56], -2.3, -0.1, ORACLE["d4_whole_picture"]),
    ("larger than the picture", [-500, -500, 900, 900], -2.3, -0.1, 0.0),
    ("none", None, -2.3, -0.2, 0.0),
])  # fmt: skip
def test_boxes_that_are_needed_and_enough(
    tmp_path: Path, model: ErnieModel, name: str, box: Any, without: float, only: float, wanted: float
) -> None:
    """The oracle's cases through a round: areas come from the picture, log-probabilities are
    given."""
    claims = f'<evidence>[{{"type": "bbox", "subj": "it", "box": {box}}}]</evidence>a' if box else "a"
    calls: list[int] = []

    def logp(batch: UnitBatch) -> np.ndarray:
        calls.append(len(batch.units))
        value = without if len(calls) <= 12 else only
        return np.full(len(batch.target_N), value)

    found = made(
        model,
        rows(tmp_path),
        EvidenceSettings(boxes=0.2),
        lambda completions, **_: [1.0] * len(completions),
        logp=logp,
        sampler=scripted(claims),
        rounds=dataclasses.replace(S, max_completion_length=120),
    )
    for group in found.make_round():
        np.testing.assert_allclose(group.reward_G, 1.0 + 0.2 * wanted, atol=1e-9)
        at = answer_start(group, 0, PROCESSOR)
        rest = PROCESSOR.decode([i for i in group.answers[0].token_ids[at:] if i not in PROCESSOR.stop_ids])
        assert rest.strip() == "a"
    assert found.metrics["evidence/cites_box"] == float(box is not None)

"""Rounds of sampled answers: what training sees is what was sampled, to the last token; what
resumes goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.online_runs import even
from support.tiny_runs import IMAGES, processor

from ernie_tune.checkpoint.state import Ranks
from ernie_tune.data.prompts import PromptStream
from ernie_tune.data.records import Meta, Record, Reward
from ernie_tune.data.units import UnitBatch
from ernie_tune.generate.batch import Completion, Prompt, eval_mode
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.scheduler import Capacity, complete
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.objectives.policy import PolicyHyper
from ernie_tune.rewards.functions import RewardFunction
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.policy import PolicyObjective, kept_answers
from ernie_tune.train.rollouts import Rolled, Rollouts, RolloutSettings

PROCESSOR = processor()
S = RolloutSettings(prompts=2, num_generations=3, max_completion_length=4, groups_per_batch=1)


def records(count: int, pictures: bool = True) -> list[Record]:
    out = []
    for i in range(count):
        tag, images = ("<image>", (str(IMAGES / f"{i:04d}.png"),)) if pictures and i % 2 == 0 else ("", ())
        words = f"{tag}read the digit {i}" + " please" * (i % 3)
        out.append(
            Record(
                "verifiable",
                ({"role": "user", "content": words},),
                images,
                reward=Reward(str(i % 10)),
                meta=Meta("x.jsonl", i + 1),
            )
        )
    return out


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    paddle.seed(5)
    return ErnieModel(preset("tiny-a"))


def sampler(model: ErnieModel, rows: int = 64) -> Callable[[Sequence[Prompt]], Mapping[int, Sequence[Completion]]]:
    engine = Engine(model, PROCESSOR)
    return lambda prompts: dict(complete(engine.scheduler(Capacity(rows=rows)), prompts))


def rollouts(model: ErnieModel, settings: RolloutSettings = S, count: int = 6, **more: Any) -> Rollouts:
    rubric = more.pop("rubric", None) or Rubric([RewardFunction(even)])
    return Rollouts(settings, records(count), PROCESSOR, more.pop("sampler", sampler(model)), rubric, **more)


def objective(temperature: float = 1.0, banned: bool = True, **more: Any) -> PolicyObjective:
    tokens = PROCESSOR.tokens
    ids = tokens.placeholders() + tokens.markers() if banned else ()
    return PolicyObjective(PolicyHyper("dapo"), ids, temperature, **more)


def trained_logp(model: ErnieModel, batch: UnitBatch, **how: Any) -> np.ndarray:
    with eval_mode(model), paddle.no_grad():
        return objective(**how).outputs(model, model(batch.inputs), batch)["logp_N"].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_and_training_see_one_policy(model: ErnieModel, temperature: float) -> None:
    """The gate: the largest difference of a token's log-probability, pictures included, prompts
    shared by their answers.
    """
    found = rollouts(model, dataclasses.replace(S, prompts=4, temperature=temperature))
    groups = found.make_round()
    assert any(g.record.images for g in groups)
    batch = found.batch(groups)
    gap = trained_logp(model, batch, temperature=temperature) - batch.columns["sampled_logp_N"]
    assert np.abs(gap).max() <= 1e-5
    loose = trained_logp(model, batch, temperature=temperature, banned=False) - batch.columns["sampled_logp_N"]
    # without the ids that sampling leaves out, it is another policy
    assert np.abs(loose).max() > 1e-3


def test_a_prompt_that_is_drawn_twice_in_a_round_is_answered_anew(model: ErnieModel) -> None:
    found = rollouts(model, dataclasses.replace(S, prompts=4, dynamic_sample=False), count=2)
    groups = found.make_round()
    assert sorted(g.number for g in groups) == [0, 0, 1, 1]
    told = [[a.token_ids for a in g.answers] for g in sorted(groups, key=lambda g: g.number)]
    assert told[0] != told[1]
    assert told[2] != told[3]


def test_what_is_trained_is_what_was_sampled(model: ErnieModel) -> None:
    groups = rollouts(model).make_round()
    for group in groups:
        batch = rollouts(model).batch([group])
        ids = [list(a.token_ids) for a in group.answers]
        assert batch.target_N.tolist() == list(itertools.chain(*ids))
        assert batch.length_C.tolist() == [len(i) for i in ids]
        # the prompt is packed once
        assert batch.inputs.num_tokens == group.unit.shared + sum(len(i) for i in ids)
        assert len(batch.columns["advantage_N"]) == len(batch.target_N)


def test_forced_tokens_are_no_targets(model: ErnieModel) -> None:
    """A steer that forces the second token: the model did not choose it, nothing is learned from
    it.
    """
    plain = sampler(model)

    def forcing(prompts: Sequence[Prompt]) -> Mapping[int, Sequence[Completion]]:
        steer = lambda: lambda answer: 9 if len(answer) == 1 else None  # noqa: E731
        return plain([dataclasses.replace(p, steer=steer) for p in prompts])

    found = rollouts(model, sampler=forcing)
    group = next(g for g in found.make_round() if max(len(a.token_ids) for a in g.answers) > 2)
    batch = found.batch([group])
    for c, answer in enumerate(group.answers):
        wanted = [t for i, t in enumerate(answer.token_ids) if i != 1]
        assert batch.target_N[batch.candidate_N == c].tolist() == wanted
    gap = trained_logp(model, batch) - batch.columns["sampled_logp_N"]
    assert np.abs(gap).max() <= 1e-5  # the forced token is in the context all the same


def test_the_same_answers_whatever_runs_beside_them(model: ErnieModel) -> None:
    told = [
        [a.token_ids for g in rollouts(model, sampler=sampler(model, rows)).make_round() for a in g.answers]
        for rows in (3, 64)
    ]
    assert told[0] == told[1]


class Two:
    """One of two ranks whose exchanges are played back: every rank sees what both said."""

    size = 2

    def __init__(self, rank: int, told: list[list[Any]]) -> None:
        self.rank, self.told, self.at = rank, told, 0

    def gather(self, value: Any) -> list[Any]:
        known = self.told[self.at] if self.at < len(self.told) else None
        self.at += 1
        if known is None:
            raise Waiting(value)
        return known


class Waiting(Exception):
    """What a rank says before it must hear the other."""


def two_ranks(make: Callable[[Ranks], Any]) -> list[Any]:
    """Both ranks run from the start until each has heard what the other says, over and over:
    exchanges need no threads that way.
    """
    told: list[list[Any]] = []
    while True:
        results, said = [], []
        for rank in range(2):
            try:
                results.append(make(Two(rank, told)))
            except Waiting as waiting:
                said.append(waiting.args[0])
        if not said:
            return results
        assert len(said) == 2, "one rank exchanges where the other does not"
        told.append(said)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_plus_plus"])
def test_two_ranks_make_the_round_of_one(model: ErnieModel, estimator: str) -> None:
    settings = dataclasses.replace(
        S, prompts=4, advantage_estimator=estimator, scale_rewards="batch", dynamic_sample=False
    )
    alone = rollouts(model, settings)
    whole = {g.number: g for g in alone.make_round()}

    def rank(ranks: Ranks) -> tuple[list[Rolled], dict[str, float]]:
        found = rollouts(model, settings, ranks=ranks)
        return found.make_round(), found.metrics

    parts = two_ranks(rank)
    assert sorted(g.number for groups, _ in parts for g in groups) == sorted(whole)
    for groups, metrics in parts:
        assert metrics == pytest.approx(alone.metrics)
        for group in groups:
            same = whole[group.number]
            assert [a.token_ids for a in group.answers] == [a.token_ids for a in same.answers]
            np.testing.assert_allclose(group.columns["advantage_N"], same.columns["advantage_N"], atol=1e-12)


def test_two_ranks_with_unlike_luck_make_equally_many_groups(model: ErnieModel) -> None:
    """Answers to some prompts never differ: one rank must draw again, so both do, and both end with
    two groups.
    """

    def lucky(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        dull = [any(w in p[0]["content"] for w in ("digit 0", "digit 2", "digit 4")) for p in prompts]
        return [0.0 if d else v for d, v in zip(dull, even(completion_ids), strict=True)]

    settings = dataclasses.replace(S, prompts=4, max_resample_times=2)
    parts = two_ranks(
        lambda ranks: rollouts(model, settings, ranks=ranks, rubric=Rubric([RewardFunction(lucky)])).make_round()
    )
    assert [len(groups) for groups in parts] == [2, 2]


def test_groups_without_spread_are_replaced_or_count_for_nothing(model: ErnieModel) -> None:
    def never(completion_ids: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(completion_ids)

    found = rollouts(model, rubric=Rubric([RewardFunction(never)]))
    groups = found.make_round()
    assert len(groups) == 2
    assert found.metrics["groups_refilled"] == S.max_resample_times
    assert found.metrics["frac_reward_zero_std"] == 1
    batch = found.batch(groups)
    assert not kept_answers(batch).any()
    assert not batch.columns["advantage_N"].any()
    assert objective().counts([batch]) == {"pg": 0.0}
    plain = rollouts(model, dataclasses.replace(S, dynamic_sample=False), rubric=Rubric([RewardFunction(never)]))
    assert kept_answers(plain.batch(plain.make_round())).all()


def test_truncated_answers_leave_the_loss_and_stay_in_the_mean(model: ErnieModel) -> None:
    settings = dataclasses.replace(S, mask_truncated_completions=True, dynamic_sample=False)
    groups = rollouts(model, settings).make_round()
    for group in groups:
        assert group.counts_G.tolist() == [float(a.finished) for a in group.answers]
        reward = np.array([one.parts["even"] for one in group.scored])
        first = np.cumsum([0, *group.length_G[:-1]])
        spread = reward.std(ddof=1)
        wanted = (reward - reward.mean()) / (spread + 1e-4) if reward.max() > reward.min() else reward * 0
        np.testing.assert_allclose(group.columns["advantage_N"][first], wanted, atol=1e-12)


def test_shaping(model: ErnieModel) -> None:
    settings = dataclasses.replace(
        S, overlong_buffer=4, overlong_penalty=2.0, missing_eos_penalty=0.5, dynamic_sample=False
    )
    for group in rollouts(model, settings).make_round():
        for i, answer in enumerate(group.answers):
            wanted = group.scored[i].parts["even"] - 2.0 * len(answer.token_ids) / 4 - 0.5 * (not answer.finished)
            assert group.reward_G[i] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("clip", "wanted"), [((-1.0, 0.5), lambda r: min(r, 0.5)), ((0.25, 2.0), lambda r: max(r, 0.25))]
)
def test_rewards_are_bounded_before_they_are_compared(
    model: ErnieModel, clip: tuple[float, float], wanted: Callable[[float], float]
) -> None:
    changes: dict[str, Any] = {"dynamic_sample": False, "missing_eos_penalty": 3.0, "reward_clip": clip}
    bounded = 0
    for group in rollouts(model, dataclasses.replace(S, **changes)).make_round():
        earned = [float(one.parts["even"] or 0) for one in group.scored]
        bounded += sum(wanted(r) != r for r in earned)
        shaped = [wanted(r) - 3.0 * (not a.finished) for r, a in zip(earned, group.answers, strict=True)]
        assert group.reward_G.tolist() == pytest.approx(shaped)
    assert bounded


def test_more_prompts_at_once_spare_drawing_again(model: ErnieModel) -> None:
    def of_odd_rows(completion_ids: list[Any], group_id: list[int], **_: Any) -> list[float]:
        return [float(i % 2) if prompt % 2 else 1.0 for i, prompt in enumerate(group_id)]

    def asked(factor: float) -> tuple[Rollouts, list[int], list[Rolled]]:
        sizes: list[int] = []
        sample = sampler(model)

        def counted(prompts: Sequence[Prompt]) -> Mapping[int, Sequence[Completion]]:
            sizes.append(len(prompts))
            return sample(prompts)

        settings = dataclasses.replace(S, over_sample=factor, max_resample_times=6)
        found = rollouts(model, settings, rubric=Rubric([RewardFunction(of_odd_rows)]), sampler=counted)
        return found, sizes, found.make_round()

    usual, few, _ = asked(1.0)
    spare, many, groups = asked(3.0)
    assert many[0] == 3 * few[0] == 3 * S.prompts
    assert len(many) <= len(few)
    assert [len(groups), all(group.spread for group in groups)] == [S.prompts, True]
    assert spare.metrics["groups_refilled"] <= usual.metrics["groups_refilled"]


def test_a_stop_string_ends_an_answer_and_its_token_is_learned_from(model: ErnieModel) -> None:
    plain = rollouts(model, dataclasses.replace(S, max_completion_length=8)).make_round()
    longest = max((answer for group in plain for answer in group.answers), key=lambda a: len(a.token_ids))
    token = longest.token_ids[1]
    stop = PROCESSOR.decode([token])
    for group in rollouts(model, dataclasses.replace(S, max_completion_length=8, stop_strings=(stop,))).make_round():
        for answer, dialogue in zip(group.answers, group.unit.dialogues, strict=True):
            tokens = [PROCESSOR.decode([i]) for i in answer.token_ids]
            ended = [stop in text for text in tokens]
            assert not any(ended[:-1])
            assert answer.finish_reason == (
                "stop" if ended[-1] or answer.token_ids[-1] in PROCESSOR.stop_ids else "length"
            )
            assert dialogue.trained_L[-len(answer.token_ids) :].all()


def test_passes_and_mini_batches(model: ErnieModel) -> None:
    settings = dataclasses.replace(S, prompts=4, num_iterations=2, num_mini_batches=2, groups_per_batch=2)
    found = rollouts(model, settings)
    windows = list(itertools.islice(found.windows(), 5))
    assert [sum(b.num_rows for b in w) for w in windows] == [2, 2, 2, 2, 2]
    assert found.round == 2
    wheres = [[u.where for b in w for u in b.units] for w in windows]
    # each pass holds the whole round
    assert sorted(wheres[0] + wheres[1]) == sorted(wheres[2] + wheres[3])


def test_resuming_in_the_middle_of_a_round(model: ErnieModel, tmp_path: Path) -> None:
    settings = dataclasses.replace(S, num_iterations=3)
    whole, part = rollouts(model, settings), rollouts(model, settings)
    straight = list(itertools.islice(whole.windows(), 8))
    stopped = list(itertools.islice(part.windows(), 4))  # one window into the second round
    part.save(tmp_path / "rollouts")
    again = rollouts(model, settings)
    again.load(tmp_path / "rollouts")
    assert again.metrics == part.metrics
    resumed = [*stopped, *itertools.islice(again.windows(), 4)]
    for a, b in zip(straight, resumed, strict=True):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one.target_N, other.target_N)
            np.testing.assert_array_equal(one.inputs.input_ids_T, other.inputs.input_ids_T)
            assert one.columns.keys() == other.columns.keys()
            for name, values in one.columns.items():
                np.testing.assert_array_equal(values, other.columns[name], err_msg=name)


def test_resuming_on_another_number_of_ranks(model: ErnieModel, tmp_path: Path) -> None:
    """One process goes on with what two had left of their round: the windows are the same."""
    settings = dataclasses.replace(S, prompts=4, num_iterations=2, groups_per_batch=2)

    def rank(ranks: Ranks) -> None:
        found = rollouts(model, settings, ranks=ranks)
        next(found.windows())
        found.save(tmp_path / str(ranks.rank))

    two_ranks(rank)
    alone = rollouts(model, settings)
    straight = list(itertools.islice(alone.windows(), 3))
    again = rollouts(model, settings)
    again.load(tmp_path / "0", tmp_path / "1")
    for window, other in zip(itertools.islice(again.windows(), 2), straight[1:], strict=True):
        assert [b.target_N.tolist() for b in window] == [b.target_N.tolist() for b in other]
        for name in ("advantage_N", "sampled_logp_N", "keep_N"):
            values, wanted = (np.concatenate([b.columns[name] for b in w]) for w in (window, other))
            np.testing.assert_allclose(values, wanted, atol=1e-12)


def test_what_is_attached_stays_with_its_tokens(model: ErnieModel) -> None:
    """A reference's and a critic's words follow their answers through shuffles; the penalty is part
    of the reward, returns follow GAE.
    """

    def attach(batch: UnitBatch) -> UnitBatch:
        more = {"ref_logp_N": batch.columns["old_logp_N"] - 0.5, "value_N": batch.target_N / 1000.0}
        return batch.with_columns(**more)

    settings = dataclasses.replace(S, advantage_estimator="gae", kl_coef=0.1, num_mini_batches=2, lam=1.0)
    for window in itertools.islice(rollouts(model, settings, attach=[attach]).windows(), 2):
        for batch in window:
            np.testing.assert_allclose(batch.columns["value_N"], batch.target_N / 1000.0)
            assert batch.columns["return_N"].shape == batch.target_N.shape
            for c, length in enumerate(batch.length_C):
                own = batch.columns["return_N"][batch.candidate_N == c]
                np.testing.assert_allclose(own[0] - own[-1], -0.1 * 0.5 * (length - 1), atol=1e-12)
    with pytest.raises(ValueError, match=r"kl_coef \(0.1\) must go with a reference"):
        rollouts(model, dataclasses.replace(S, kl_coef=0.1)).make_round()


def test_prompts_that_are_too_long(model: ErnieModel) -> None:
    found = rollouts(model, dataclasses.replace(S, max_prompt_length=30), count=3)
    assert {g.record.meta.line for g in found.make_round()} <= {1, 2, 3}
    tight = rollouts(model, dataclasses.replace(S, max_prompt_length=2), count=3)
    with pytest.raises(ValueError, match=r"max_prompt_len \(2\) must leave a prompt: all 3 are longer"):
        tight.make_round()


def test_every_judged_group_is_told(model: ErnieModel) -> None:
    told: list[tuple[int, int]] = []
    found = rollouts(model, sink=lambda number, groups: told.append((number, len(groups))))
    list(itertools.islice(found.windows(), 2))
    assert told == [(0, 2), (1, 2)]
    assert {
        "reward",
        "reward_std",
        "rewards/even/mean",
        "completions/mean_length",
        "completions/clipped_ratio",
    } <= found.metrics.keys()


def test_prompts_by_difficulty(model: ErnieModel) -> None:
    stream = PromptStream(6, 42)
    found = rollouts(model, prompts=stream)
    found.make_round()
    assert stream.visits.sum() == S.prompts * (1 + found.metrics["groups_refilled"])


@pytest.mark.parametrize(("changes", "match"), [
    ({"advantage_estimator": "ppo"}, r"advantage_estimator \('ppo'\) must be one of grpo, rloo"),
    ({"scale_rewards": "std"}, r"scale_rewards \('std'\) must be one of group"),
    ({"reward_aggregation": "sum"}, r"reward_aggregation \('sum'\) must be one of sum_then_normalize"),
    ({"num_generations": 1}, r"num_generations \(1\) must be at least 2 for advantage_estimator grpo"),
    ({"temperature": 0.0}, r"temperature \(0\) must be above 0 to sample"),
    ({"top_p": 0.9}, r"top_p \(0.9\), top_k \(0\) and min_p \(0\) must be 1, 0 and 0 when learning"),
    ({"min_p": 0.1}, r"min_p \(0.1\) must be 1, 0 and 0"),
    ({"keep_sampling_mask": True}, r"top_k \(0\) must be from 1 to 64 with keep_sampling_mask"),
    ({"keep_sampling_mask": True, "top_k": 65}, r"top_k \(65\) must be from 1 to 64"),
    ({"reward_clip": (1.0,)}, r"reward_clip \(1.0\) must be two numbers"),
    ({"reward_clip": (1.0, 0.0)}, r"low and then high"),
    ({"reward_clip": (0.0, 1.0), "reward_aggregation": "normalize_then_sum"}, r"reward_aggregation"),
    ({"over_sample": 0.5}, r"over_sample \(0.5\) must be at least 1"),
])  # fmt: skip
def test_bad_settings(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(S, **changes)


def test_prompts_must_divide_among_ranks(model: ErnieModel) -> None:
    with pytest.raises(ValueError, match=r"prompts of a round \(3\) must be a multiple of .* num_mini_batches \(2\)"):
        rollouts(model, dataclasses.replace(S, prompts=3), ranks=Two(0, []))

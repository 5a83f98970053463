"""Answers sampled from the policy itself, judged, compared within their group, and dealt out as
windows of micro-batches: an iterator, like any data.

A round: draw prompts -> sample `num_generations` answers to each -> judge -> keep groups that
differ (draw again, a few times) -> what the answers' tokens were worth before (old, reference,
values) -> advantages -> `num_iterations` passes in `num_mini_batches` windows. A group of answers
is a unit whose prompt is packed once; a group lives on one rank. The token ids that were sampled
are the ids that are trained, and no others: forced tokens are no targets. A sample is seeded by
(seed, draw, prompt, number), so every layout gives the same answers. Refuses to know: losses,
optimizers, which engine samples, what judges ask.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.state import ALONE, Ranks
from ernie_tune.config.language import say
from ernie_tune.data.batching import THINKING
from ernie_tune.data.processor import Encoded, Processor, RowTooLong
from ernie_tune.data.prompts import PromptStream
from ernie_tune.data.records import Record
from ernie_tune.data.units import Unit, UnitBatch, collate_units
from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.models.replay import COLUMN as EXPERTS
from ernie_tune.models.replay import of_completions
from ernie_tune.objectives import advantages as adv
from ernie_tune.objectives.objective import SUPPORT
from ernie_tune.objectives.policy import KlControl
from ernie_tune.rewards.functions import Answered, Called
from ernie_tune.rewards.rubric import Rubric, Scored
from ernie_tune.rewards.shaping import soft_overlong
from ernie_tune.train.agreement import Agreement
from ernie_tune.train.dealing import Deal, Seat, apart, seated, seats
from ernie_tune.train.evidence import Evidence
from ernie_tune.train.rolled import (
    AnsweredPrompt,
    Rolled,
    advantage_metrics,
    called_of,
    group_state,
    measured,
    number_of,
    parts_of,
    support_of,
)
from ernie_tune.train.rollout_settings import RolloutSettings
from ernie_tune.train.turns import Turns, last_turn, rebuilt, tool_metrics

ROLLOUTS_FILE, ARRAYS_FILE = "rollouts.json", "rollouts.npz"
Sampler = Callable[[Sequence[Prompt]], Mapping[int, Sequence[Completion]]]
Attach = Callable[[UnitBatch], UnitBatch]
Beside = Callable[[UnitBatch, Sequence[Rolled], int], UnitBatch]  # batch, its groups, the round
THINK_OPEN = "<think>\n"


class Rollouts:
    """`windows()` yields micro-batches (`UnitBatch`) with the columns old_logp_N, sampled_logp_N,
    advantage_N (and ref_logp_N, value_N, return_N where attached). `finish`: what is added to a
    round's groups once they have advantages; `beside`: what rides along in the batches that are
    learned from. `metrics` are those of the newest round; `sink` gets
    every judged group once. Raises ValueError where no prompt fits.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        records: Sequence[Record],
        processor: Processor,
        sampler: Sampler,
        rubric: Rubric,
        attach: Sequence[Attach] = (),
        prompts: PromptStream | None = None,
        ranks: Ranks = ALONE,
        sink: Callable[[int, Sequence[Rolled]], None] = lambda round_number, groups: None,
        finish: Sequence[Callable[[Sequence[Rolled]], None]] = (),
        agreement: Agreement | None = None,
        evidence: Evidence | None = None,
        beside: Beside | None = None,
        second_opinion: Callable[[Sequence[Rolled]], Mapping[str, float]] = lambda groups: {},
    ) -> None:
        self.second_opinion = second_opinion  # of judges that nothing is learned from
        self.settings, self.processor, self.evidence = settings, processor, evidence
        self.records = records if evidence is None else evidence.records  # twins behind the rows
        self.sampler, self.rubric, self.attach, self.sink = sampler, rubric, tuple(attach), sink
        self.prompts = prompts or PromptStream(len(records), settings.seed)
        self.ranks, self.finish, self.agreement, self.beside = ranks, tuple(finish), agreement, beside
        own = {tool.name: tool for tool in settings.own_tools}
        used = (settings.max_turns, settings.max_pictures, settings.tools, own, settings.max_tool_pixels)
        self.turns = Turns(processor, *used) if settings.tools or own else None
        self.kl = KlControl(settings.kl_coef)  # of the per-token penalty, as it is now
        self.round = 0
        self.metrics: dict[str, float] = {}
        self.seconds: dict[str, float] = {}  # of the newest round: rollout, reward, old_logps
        self.tokens = 0  # that this rank sampled in it
        self.deal = Deal(settings.num_mini_batches, ranks.size)
        self._fits: dict[int, bool] = {}  # whether a prompt is short enough, once it was drawn
        # The present round: its groups on this rank by their places in it, and the windows that
        # have not been trained, as places.
        self._groups_at: dict[int, Rolled] = {}
        self._left: list[list[int]] = []
        parts = settings.num_mini_batches * ranks.size
        if settings.prompts % parts and ranks.size > 1:
            raise ValueError(
                say(
                    f"prompts of a round ({settings.prompts}) must be a multiple of the processes that read "
                    f"different rows times num_mini_batches ({parts}); change the batch size",
                    f"每轮的提问数（{settings.prompts}）须为读取不同数据的进程数乘 num_mini_batches（{parts}"
                    "）的倍数；请修改批大小",
                )
            )

    # --- windows ----------------------------------------------------------------------------------

    def windows(self) -> Iterator[list[UnitBatch]]:
        """Windows without end. Each is taken off the round when it is asked for, so that a
        checkpoint after its step holds the rest.
        """
        s = self.settings
        while True:
            if not self._left:
                own = self.deal.own(range(s.prompts), self.ranks.rank)
                before, made = self.prompts.state_dict(), None
                try:
                    made = self.make_round()
                finally:
                    if made is None:  # a reward function failed: who goes on makes this round again
                        self.prompts.load_state_dict(before)
                self._groups_at = dict(zip(own, made, strict=True))
                self._left = self.deal.passes(s.prompts, s.num_iterations, s.seed, self.round)
            mine = [self._groups_at[at] for at in self._left[0] if at in self._groups_at]
            size = s.groups_per_batch
            window = [self._learned(mine[i : i + size]) for i in range(0, len(mine), size)]
            del self._left[0]
            yield window

    def make_round(self) -> list[Rolled]:
        """Sample, judge, compare: this rank's groups with their columns."""
        self.seconds, self.tokens = {}, 0
        groups = self._sampled()
        self.compare(groups)
        seen, attempts, dropped = self._seen
        self.metrics = self._reported() | measured(seen, attempts, self.rubric.names, self.ranks, dropped)
        self.metrics |= {**advantage_metrics(groups, self.ranks), **self.second_opinion(seen)}
        self.metrics |= {} if self.agreement is None else self.agreement.metrics
        if self.turns:
            told = self.ranks.gather(tool_metrics([a.calls for group in seen for a in group.answers]))
            sums = {name: np.sum([part[name] for part in told], axis=0) for name in told[0]}
            self.metrics |= {name: float(total / max(count, 1)) for name, (total, count) in sums.items()}
        self.sink(self.round, groups)
        self.round += 1
        return groups

    def _reported(self) -> dict[str, float]:
        """What reward functions and evidence said beside the rewards, over all ranks."""
        told = self.ranks.gather(self.rubric.reported())
        names = sorted({name for part in told for name in part})
        totals = ("/timeouts", "/errors")
        known = {name: [part[name] for part in told if name in part] for name in names}
        out = {n: float(np.sum(v) if n.endswith(totals) else np.mean(v)) for n, v in known.items()}
        return out | ({} if self.evidence is None else self.evidence.metrics)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def _learned(self, groups: Sequence[Rolled]) -> UnitBatch:
        """A micro-batch as it is learned from."""
        batch = self.batch(groups)
        return batch if self.beside is None else self.beside(batch, groups, self.round - 1)

    def batch(self, groups: Sequence[Rolled]) -> UnitBatch:
        """Groups side by side in one pack, with their columns."""
        batch = collate_units([group.unit for group in groups], self.processor)
        names = set.intersection(*(set(group.columns) for group in groups))
        columns = {name: np.concatenate([group.columns[name] for group in groups]) for name in sorted(names)}
        return batch.with_columns(**columns)

    @property
    def newest(self) -> list[Rolled]:
        """The groups of the present round that this rank trains."""
        return [*self._groups_at.values()]

    # --- sampling ---------------------------------------------------------------------------------

    def _sampled(self) -> list[Rolled]:
        """This rank's groups of a round: prompts are drawn until as many as the round has have
        answers that differ, or enough was tried.

        All ranks draw the same numbers and know of all groups which differ, so the round is the one
        of a single process; a group that was sampled elsewhere than where it is trained moves.
        """
        s, ranks = self.settings, self.ranks
        mine: list[Rolled] = []
        found: list[Seat] = []
        lacking, attempts = s.prompts, 0
        while True:
            numbers = self._drawn(math.ceil(lacking * s.over_sample) if s.dynamic_sample else lacking)
            names = apart(numbers, len(self.records))
            some = self._groups(self.deal.own(numbers, ranks.rank), self.deal.own(names, ranks.rank))
            if self.evidence is not None:
                self.evidence.weigh(some, ranks, more=attempts > 0)
            told = ranks.gather([(g.number, g.spread, g.share_right) for g in some])
            rights = [(number, right) for part in told for number, _, right in part]
            self.prompts.saw({n: right for n, right in rights if right is not None and n < self.prompts.size})
            before = [sum(seat.rank == rank for seat in found) for rank in range(ranks.size)]
            owners = [self.deal.owner(i) for i in range(len(numbers))]
            found += seats(owners, [[spread for _, spread, _ in part] for part in told], before)
            mine += some
            lacking = s.prompts - sum(seat.spread for seat in found)
            if not s.dynamic_sample or lacking <= 0 or attempts == s.max_resample_times:
                break
            attempts += 1
        self._seen = (mine, attempts, max(lacking, 0) if s.dynamic_sample else 0)
        return self._moved(mine, seated(found, s.prompts))

    def _moved(self, mine: Sequence[Rolled], round_: Sequence[Seat]) -> list[Rolled]:
        """The groups of a round that this rank trains; those that others have sampled are made
        again from their tokens and rewards.
        """
        rank = self.ranks.rank
        leaving = [seat for at, seat in enumerate(round_) if seat.rank != self.deal.owner(at)]
        states: dict[Seat, Any] = {}
        if leaving:
            told = self.ranks.gather([(seat, group_state(mine[seat.number])) for seat in leaving if seat.rank == rank])
            states = {seat: state for part in told for seat, state in part}
        out = []
        for seat in self.deal.own(round_, rank):
            group = mine[seat.number] if seat.rank == rank else self._group(states[seat])
            if self.settings.dynamic_sample and not seat.spread:  # it fills the round and counts for nothing
                group.counts_G = np.zeros_like(group.counts_G)
            out.append(group)
        return out

    def _drawn(self, count: int) -> list[int]:
        """The next prompts that are not too long, the same on every rank. Raises ValueError where
        all are.
        """
        found: list[int] = []
        together, width = (
            (lambda n: (n,), 1) if self.evidence is None else (self.evidence.together, self.evidence.width)
        )
        while len(found) < count:
            for number in self.prompts.draw(-(-(count - len(found)) // width)):
                if number not in self._fits:
                    self._fits[number] = all(self._short(self.records[n]) for n in together(number))
                found += together(number) if self._fits[number] else ()
            if not any(self._fits.values()) and len(self._fits) == self.prompts.size:
                limit, size = self.settings.max_prompt_length, self.prompts.size
                raise ValueError(
                    say(
                        f"max_prompt_len ({limit}) must leave a prompt: all {size} are longer; raise it",
                        f"max_prompt_len（{limit}）须留下可用的提示：全部 {size} 条都更长；请调大",
                    )
                )
        return found

    def _listed(self, record: Record) -> tuple[Mapping[str, Any], ...]:
        """The tools that a prompt lists: the row's own, and those that users bring."""
        return (*record.tools, *(tool.schema for tool in self.settings.own_tools))

    def _short(self, record: Record) -> bool:
        """Whether a prompt may be answered; one that is too long is never cut, a cut could part a
        picture.
        """
        tokens, _ = self.processor.measure(
            record.prompt,
            record.images,
            record.videos,
            tools=self._listed(record),
            thinking=THINKING.get(record.mode),
            add_generation_prompt=True,
            where=str(record.meta),
        )
        return tokens <= self.settings.max_prompt_length

    def _groups(self, numbers: Sequence[int], names: Sequence[int]) -> list[Rolled]:
        """Prompts with their judged answers, in this order; `names`: what chance is drawn by."""
        seed = int(np.random.SeedSequence([self.settings.seed, self.prompts.draws]).generate_state(1)[0])
        return self.judge(self.sample([self.records[number] for number in numbers], numbers, seed, names=names))

    def sample(
        self,
        records: Sequence[Record],
        numbers: Sequence[int],
        seed: int,
        n: int | None = None,
        greedy: bool = False,
        names: Sequence[int] | None = None,
        most_tokens: int = 0,
    ) -> list[AnsweredPrompt]:
        """`n` answers (num_generations) to each prompt by the policy as it is, or one `greedy` one.
        `numbers` name the prompts and, with `seed`, what is drawn for them, where `names` does not.
        `most_tokens` of an answer: then, or greedily, to prompts of any length. Raises RowTooLong.
        """
        free = greedy or most_tokens > 0
        params = self.settings.sampling(self.processor, seed, n, greedy, most_tokens)
        asked = [self._encoded(record, None if free else self.settings.max_prompt_length) for record in records]
        prompts = [
            Prompt(one.row, params, key, name, experts=self.settings.note_experts)
            for key, (one, name) in enumerate(zip(asked, names or numbers, strict=True))
        ]
        with self._timed("rollout"):
            found = self.sampler(prompts)
            talks = self.turns.go_on(records, prompts, asked, found, self.sampler) if self.turns else []
        drawn = []
        for key, (number, record, one) in enumerate(zip(numbers, records, asked, strict=True)):
            done = tuple(talk.done for talk in talks[key]) if talks else tuple(found[key])
            self.tokens += sum(sum(answer.sampled) for answer in done)
            calls = [talk.calls for talk in talks[key]] if talks else ()
            dialogues = tuple(talk.dialogue for talk in talks[key]) if talks else ()
            drawn.append(AnsweredPrompt(number, record, one, done, self._answers(record, done, calls), dialogues))
        return drawn

    def judge(self, drawn: Sequence[AnsweredPrompt]) -> list[Rolled]:
        """What the answers earned, ready to be compared."""
        with self._timed("reward"):
            judged = self.rubric([(one.record, one.answers) for one in drawn])
        return [self._rolled(one, scored) for one, scored in zip(drawn, judged, strict=True)]

    def compare(self, groups: Sequence[Rolled]) -> None:
        """Give every group what its tokens were worth before, and how much better than expected its
        answers are.
        """
        with self._timed("old_logps"):
            self._agree(groups)
            self._attach(groups)
        self._advantages(groups)
        for more in self.finish:
            more(groups)

    def _answers(
        self, record: Record, completions: Sequence[Completion], calls: Sequence[Sequence[Called]] = ()
    ) -> tuple[Answered, ...]:
        opened = self._opened(record)
        calls = calls or [()] * len(completions)
        return tuple(self._read(done, opened, called) for done, called in zip(completions, calls, strict=True))

    def _encoded(self, record: Record, most_tokens: int | None) -> Encoded:
        """The prompt as the model sees it. Raises RowTooLong."""
        return self.processor.encode(
            record.prompt,
            list(record.images),
            list(record.videos),
            tools=self._listed(record),
            thinking=THINKING.get(record.mode),
            add_generation_prompt=True,
            max_tokens=most_tokens,
            where=str(record.meta),
        )

    def _opened(self, record: Record) -> bool:
        template = self.processor.template
        return template.opens_thought(template.thinks(record.prompt, THINKING.get(record.mode)))

    def _read(self, done: Completion, opened: bool, calls: Sequence[Called] = ()) -> Answered:
        said = done.token_ids[last_turn(done) :] if calls else done.token_ids
        text = (THINK_OPEN if opened else "") + self.processor.decode(
            [i for i in said if i not in self.processor.stop_ids]
        )
        return Answered(text, tuple(done.token_ids), done.finish_reason, tuple(done.logps), tuple(calls))

    def _rolled(self, drawn: AnsweredPrompt, scored: Sequence[Scored]) -> Rolled:
        s, prompt, answers, completions = self.settings, drawn.prompt, drawn.answers, drawn.completions
        parts_GF = np.array([[number_of(one.parts[name]) for name in self.rubric.names] for one in scored])
        reward_G = adv.weighted_sum(parts_GF, np.array(self.rubric.weights))
        if s.reward_clip:
            reward_G = np.clip(reward_G, s.reward_clip[0], s.reward_clip[1])
        if s.overlong_buffer:
            shaped = [soft_overlong(len(a.token_ids), s.max_completion_length, s.overlong_buffer) for a in answers]
            reward_G = reward_G + s.overlong_penalty * np.array(shaped)
        if s.missing_eos_penalty is not None:
            reward_G = reward_G - s.missing_eos_penalty * np.array([not a.finished for a in answers])
        finished_G = np.array([a.finished for a in answers])
        counts_G = (~np.isnan(reward_G) | s.unjudged) & (finished_G | (not s.mask_truncated_completions))
        sampled = [np.array(c.sampled, bool) for c in completions]
        dialogues = list(drawn.dialogues)
        for completion, chosen in zip(completions, sampled, strict=True) if not dialogues else ():
            dialogue = prompt.extended(completion.token_ids)
            dialogue.trained_L[:] = False
            dialogue.trained_L[prompt.num_tokens :] = chosen
            dialogues.append(dialogue)
        nothing = np.full(len(answers), np.nan)
        record = drawn.record
        alike = all(d.num_images == prompt.num_images for d in dialogues)  # else the prompt's are not all
        shared = prompt.num_tokens if s.prefix_sharing and len(dialogues) > 1 and alike else 0
        unit = Unit(
            tuple(dialogues),
            shared,
            "sampled",
            reward_G,
            nothing,
            nothing,
            domain=record.domain,
            where=str(record.meta),
        )
        said = [c.sampled_logps if s.keep_sampling_mask and c.kept else c.logps for c in completions]
        logps = [np.asarray(one, np.float64)[chosen] for one, chosen in zip(said, sampled, strict=True)]
        logp_N = np.concatenate(logps)
        columns = {"sampled_logp_N": logp_N, "old_logp_N": logp_N.copy()}
        if s.keep_sampling_mask:
            columns[SUPPORT] = support_of(completions, s.top_k)
        experts_MLk = of_completions(completions, [d.num_tokens for d in dialogues])
        if experts_MLk is not None:
            columns[EXPERTS] = experts_MLk
        return Rolled(
            drawn.number, record, unit, answers, tuple(scored), reward_G, counts_G.astype(np.float64), columns
        )

    # --- worth ------------------------------------------------------------------------------------

    def _agree(self, groups: Sequence[Rolled]) -> None:
        """The trainer's own log-probabilities in the place of the engine's, where it is to compute
        them.
        """
        if self.agreement is None:
            return
        size = self.settings.groups_per_batch
        parts = [groups[i : i + size] for i in range(0, len(groups), size)]
        told = self.agreement(self.round, [self.batch(part) for part in parts])
        for part, old_N in zip(parts, told, strict=False):
            for group, own, _ in parts_of(part, old_N, old_N):
                group.columns["old_logp_N"] = own

    def _attach(self, groups: Sequence[Rolled]) -> None:
        """What the policy of this moment, a reference or a critic says of the answers' tokens, kept
        with each group.
        """
        size = self.settings.groups_per_batch
        for i in range(0, len(groups) if self.attach else 0, size):
            part = groups[i : i + size]
            batch = self.batch(part)
            for attach in self.attach:
                batch = attach(batch)
            ends = np.cumsum([int(group.length_G.sum()) for group in part])[:-1]
            for name, values in batch.columns.items():
                if name == EXPERTS:
                    continue  # each group has its own
                for group, own in zip(part, np.split(values, ends), strict=True):
                    group.columns[name] = own

    def _total(self, sums: np.ndarray) -> np.ndarray:
        """Added up over the ranks that hold different prompts."""
        return np.sum(self.ranks.gather(sums), axis=0)

    def _advantages(self, groups: Sequence[Rolled]) -> None:
        """The columns advantage_N and keep_N, and for a critic return_N."""
        s = self.settings
        counts = [g.length_G for g in groups]
        length_C = np.concatenate([*counts, np.zeros(0, np.int64)])
        candidate_N = np.repeat(np.arange(len(length_C)), length_C)
        group_C = np.repeat(np.arange(len(groups)), [len(n) for n in counts])
        reward_C = np.concatenate([*(g.reward_G for g in groups), np.zeros(0)])
        kl_N = self._kl(groups)
        if s.advantage_estimator == "gae":
            advantage_N = self._with_critic(groups, reward_C, candidate_N, kl_N)
        elif s.advantage_estimator == "reinforce_plus_plus":
            reward_N = adv.token_rewards(reward_C, candidate_N, kl_N, self.kl.coef)
            advantage_N = adv.whiten(adv.returns_to_go(reward_N, candidate_N), self._total)
        else:
            if kl_N is not None:
                reward_C = reward_C - self.kl.coef * np.bincount(candidate_N, kl_N, minlength=len(length_C))
            advantage_N = self._of_answers(groups, reward_C, group_C)[candidate_N]
            if s.advantage_estimator == "reinforce_plus_plus_baseline":
                advantage_N = adv.whiten(advantage_N, self._total)
        keep_N = np.concatenate([*(g.counts_G for g in groups), np.zeros(0)])[candidate_N]
        for group, part, keep in parts_of(groups, advantage_N, keep_N):
            group.columns["advantage_N"], group.columns["keep_N"] = part, keep

    def _kl(self, groups: Sequence[Rolled]) -> np.ndarray | None:
        """log pi_old - log pi_ref of each token, where it is part of the reward."""
        if not self.settings.kl_coef:
            return None
        lacking = [g for g in groups if "ref_logp_N" not in g.columns]
        if lacking:
            raise ValueError(
                say(
                    f"kl_coef ({self.settings.kl_coef:g}) must go with a reference; set ref_mode, or kl_coef: 0",
                    f"kl_coef（{self.settings.kl_coef:g}）须与参考模型同用；请设 ref_mode，或 kl_coef: 0",
                )
            )
        return np.concatenate([*(g.columns["old_logp_N"] - g.columns["ref_logp_N"] for g in groups), np.zeros(0)])

    def _of_answers(self, groups: Sequence[Rolled], reward_C: np.ndarray, group_C: np.ndarray) -> np.ndarray:
        s = self.settings
        if s.reward_aggregation == "normalize_then_sum":
            parts = [[number_of(one.parts[n]) for n in self.rubric.names] for g in groups for one in g.scored]
            matrix_CF = np.array(parts).reshape(len(reward_C), len(self.rubric.names))
            return adv.normalise_then_sum(matrix_CF, np.array(self.rubric.weights), group_C, total=self._total)
        if s.advantage_estimator == "rloo":
            return adv.leave_one_out(reward_C, group_C)
        if s.advantage_estimator == "max_rl":
            return adv.mean_relative(reward_C, group_C)
        scale = "none" if s.advantage_estimator == "reinforce_plus_plus_baseline" else s.scale_rewards
        return adv.group_relative(reward_C, group_C, scale, total=self._total)

    def _with_critic(
        self, groups: Sequence[Rolled], reward_C: np.ndarray, candidate_N: np.ndarray, kl_N: np.ndarray | None
    ) -> np.ndarray:
        s = self.settings
        value_N = np.concatenate([*(g.columns["value_N"] for g in groups), np.zeros(0)])
        reward_N = adv.token_rewards(reward_C, candidate_N, kl_N, self.kl.coef)
        # Answers that count for nothing leave mean and spread, too.
        keep_N = np.concatenate([*(g.counts_G for g in groups), np.zeros(0)])[candidate_N] > 0
        if s.whiten_rewards:
            reward_N[keep_N] = adv.whiten(reward_N[keep_N], self._total, keep_mean=True)
        advantage_N, return_N = adv.gae(reward_N, value_N, candidate_N, s.gamma, s.lam)
        for group, part, _ in parts_of(groups, return_N, return_N):
            group.columns["return_N"] = part
        white_N = np.zeros_like(advantage_N)
        white_N[keep_N] = adv.whiten(advantage_N[keep_N], self._total)
        return white_N

    # --- resuming ---------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """The stream of prompts and what is left of the present round. Raises OSError."""
        wanted = {at for window in self._left for at in window}
        groups = {at: group for at, group in self._groups_at.items() if at in wanted}
        state = {
            "round": self.round,
            "prompts": self.prompts.state_dict(),
            "metrics": self.metrics,
            "left": self._left,
            "groups": [[at, group_state(group)] for at, group in groups.items()],
            "unchecked": self.rubric.unchecked,
        }
        arrays = {f"{at}/{name}": values for at, g in groups.items() for name, values in g.columns.items()}
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
        (folder / ROLLOUTS_FILE).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    def load(self, *folders: Path) -> None:
        """Go on where `save` stopped, with the same data. `folders`: those of all ranks, however
        many there were. Raises ValueError for other prompts.
        """
        self._groups_at = {}
        for folder in folders:
            state = json.loads((folder / ROLLOUTS_FILE).read_text(encoding="utf-8"))
            self.round, self.metrics, self._left = state["round"], state["metrics"], state["left"]
            self.rubric.unchecked = state["unchecked"]
            self.prompts.load_state_dict(state["prompts"])
            with np.load(folder / ARRAYS_FILE) as arrays:
                for at, known in state["groups"]:
                    if self.deal.owner(at) == self.ranks.rank:
                        group = self._groups_at[at] = self._group(known)
                        prefix = f"{at}/"
                        columns = {name: arrays[name] for name in arrays if name.startswith(prefix)}
                        group.columns |= {name.removeprefix(prefix): value for name, value in columns.items()}

    def _group(self, state: Mapping[str, Any]) -> Rolled:
        """A group from what `_group_state` says of it."""
        number = state["number"]
        try:
            prompt = self._encoded(self.records[number], self.settings.max_prompt_length)
        except RowTooLong as error:
            raise ValueError(
                say(
                    f"prompt {number} ({self.records[number].meta}) must be as short as when it was answered; "
                    "restore max_prompt_len",
                    f"提示 {number}（{self.records[number].meta}）须与作答时一样短；请恢复 max_prompt_len",
                )
            ) from error
        record, completions = self.records[number], tuple(Completion(*known) for known in state["completions"])
        scored = [Scored(*known) for known in state["scored"]]
        calls = [[called_of(known) for known in some] for some in state.get("calls", ())]
        dialogues = (
            tuple(
                rebuilt(self.turns, record, prompt, done, some)
                for done, some in zip(completions, calls, strict=True)
                if self.turns
            )
            if calls
            else ()
        )
        answers = self._answers(record, completions, calls)
        group = self._rolled(AnsweredPrompt(number, record, prompt, completions, answers, dialogues), scored)
        group.columns |= {name: np.array(values) for name, values in state.get("columns", {}).items()}
        group.reward_G = group.unit.score_C[:] = np.array([number_of(r) for r in state["reward"]])
        group.counts_G = np.array(state["counts"], np.float64)
        return group

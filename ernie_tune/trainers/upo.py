"""`UPOTrainer`: pairs, rankings, ratings, labels and sampled answers in one weighted sum, each term
divided by its own global count.

What is publicly known of ERNIE 4.5's UPO (Unified Preference Optimization) is words: Baidu's README
calls it a modified reinforcement learning method, and readers' notes on the technical report
describe a pairwise preference loss, as DPO has it, added to PPO, with pairs from the current
samples ("online") or made beforehand ("offline"), for stability and against reward hacking. No
formula and no weight is public. The sum here is a superset that is consistent with those words, and
ours; it does not claim to be Baidu's. arXiv 2405.17956 uses the same name for another method, whose
structure `dpo_aux` has.

Refuses to know: the terms' formulas (objectives), how rounds of answers are made
(train/rollouts.py), the run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.checks_methods import upo_terms
from ernie_tune.config.language import say
from ernie_tune.data.batching import BatchStream, RecordEncoder
from ernie_tune.data.records import Record
from ernie_tune.data.survey import Survey
from ernie_tune.data.units import JUDGED, UnitBatch, UnitEncoder, collate_units
from ernie_tune.evaluate.measure import Measure
from ernie_tune.machine.placed import Placed
from ernie_tune.objectives.objective import Outputs, logp_outputs
from ernie_tune.objectives.online_pairs import PairRule
from ernie_tune.objectives.unpaired import RewardShift
from ernie_tune.objectives.upo import PRESETS, SAMPLING_PRESETS, SamplingPreset, UpoSettings
from ernie_tune.peft.config import PeftConfig
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import Loop, StepRecord
from ernie_tune.train.preference import UpoObjective
from ernie_tune.train.rollouts import Rolled
from ernie_tune.train.upo import OnlineUpoObjective, PairTerm, is_sampled, unit_pairs
from ernie_tune.trainers import assemble
from ernie_tune.trainers.by_hand import ByHand
from ernie_tune.trainers.judged import ancestry, compared_with, unit_encoder, with_mismatched
from ernie_tune.trainers.judges import rubric_of
from ernie_tune.trainers.keeper import StreamPart
from ernie_tune.trainers.method import Method, Rows, RowSets, Stateful
from ernie_tune.trainers.neighbours import settings_for
from ernie_tune.trainers.online import SampledAnswers, given_model
from ernie_tune.trainers.online_settings import policy_hyper
from ernie_tune.trainers.ppo import AgainstCritic
from ernie_tune.trainers.preference import PreferenceMethod, ReferencePart, hyper_of

_READS = {"pair": "pair", "bco_pair": "pair", "rank": "ranking", "rate": "rating", "bin": "label"}
_ROUTERS = re.compile(r"\bmlp\.gate\.weight(_1)?$")
ROWS_FILE = "judged_rows_state.json"


def check_ancestor(config: RunConfig) -> None:
    """ValueError for a policy that has not been through SFT, unless allow_base."""
    known, words = ancestry(config)
    if known is False and not config.signals.allow_base:
        raise ValueError(
            say(
                "model_name_or_path ({words}) must have been through SFT before UPO; train it on "
                "demonstrations first, or set allow_base: true",
                "UPO 之前 model_name_or_path（{words}）须经过 SFT；请先用示范数据训练，或设 allow_base: true",
                words=words,
            )
        )


class UPO(PreferenceMethod):
    """Every kind of judgement at once. Raises ValueError for a policy that has not been through
    SFT, unless allow_base.
    """

    stages = ("UPO",)

    def make_encoder(self) -> UnitEncoder:
        check_ancestor(self.config)
        return super().make_encoder()

    def learned(self) -> tuple[str, ...]:
        return learned_signals(upo_settings(self.config), self.signals)

    def learns_pairs(self) -> bool:
        settings = upo_settings(self.config)
        return settings.active("pair") or settings.active("bco_pair")

    def objective(self, total_steps: int, steps_per_pass: float) -> UpoObjective:
        return UpoObjective(upo_settings(self.config), RewardShift(self.config.preference.reward_shift_decay))


class SampledUPO(SampledAnswers):
    """Sampled answers are learned from twice in one step: by the policy gradient, and as pairs
    among them, or beside judged rows of the data that ride in the same window. Raises ValueError
    for a policy that has not been through SFT, unless allow_base.
    """

    stages = ("UPO",)

    def make_encoder(self) -> RecordEncoder:
        check_ancestor(self.config)
        self.preset = SAMPLING_PRESETS[self.config.preference.loss_type[0]]
        self.term_weights = sampling_weights(self.config, self.preset)
        self.judged = row_settings(self.config, self.preset)
        learned = learned_signals(self.judged, JUDGED) if self.judged else ()
        self.signals = ("verifiable", "prompt", *learned)
        self.unit_encoder = unit_encoder(self.config, self.processor, learned)
        self._rows: BatchStream | None = None
        return super().make_encoder()

    # --- rows ------------------------------------------------------------------------------------

    def more_rows(self, sets: Sequence[Rows]) -> Sequence[Rows]:
        super().more_rows([_of(rows, self._asked) for rows in sets])
        return sets

    def _asked(self, record: Record) -> bool:
        """Whether a row is answered by sampling; else it brings its answers."""
        return record.signal not in JUDGED

    def stream(self, rows: RowSets) -> Any:
        asked = [_of(part, self._asked) for part in rows.train]
        if self.judged is not None:
            brought = [_of(part, lambda record: not self._asked(record)) for part in rows.train]
            self._rows = self._row_stream([part for part in brought if len(part)])
        if not sum(map(len, asked)):
            raise ValueError(
                say(
                    f"train_dataset ({sum(map(len, rows.train))} rows) must hold prompts to answer, with loss_type "
                    f"{self.config.preference.loss_type[0]}; add verifiable rows, or take upo_hetero",
                    f"loss_type {self.config.preference.loss_type[0]} 需要可供采样回答的提示，train_dataset（"
                    f"{sum(map(len, rows.train))} 行）中没有；请加入 verifiable 数据，或用 upo_hetero",
                )
            )
        return super().stream(RowSets(asked, rows.held))

    def steps_per_pass(self, rows: RowSets) -> float:
        return super().steps_per_pass(RowSets([_of(part, self._asked) for part in rows.train], rows.held))

    def _row_stream(self, brought: Sequence[Rows]) -> BatchStream:
        """As many judged rows a window as it has prompts, in as many micro-batches."""
        s = self.settings
        if not brought:
            raise ValueError(
                say(
                    f"train_dataset (0 judged rows) must hold rows of {', '.join(self.signals[2:])} with loss_type "
                    f"{self.config.preference.loss_type[0]}; add them, or take upo_online",
                    f"loss_type {self.config.preference.loss_type[0]} 需要带评判的数据（{'、'.join(self.signals[2:])}"
                    "），train_dataset 中有 0 行；请补充，或用 upo_online",
                )
            )
        groups = s.prompts // s.num_mini_batches // self.place.batch[1]
        size = min(s.groups_per_batch, groups)
        train = dataclasses.replace(
            self.config.train, per_device_train_batch_size=size, gradient_accumulation_steps=-(-groups // size)
        )
        data = dataclasses.replace(self.config.data, train_dataset_prob=(), mix_strategy="concat")
        config = RunConfig(**{**vars(self.config), "train": train, "data": data})
        return assemble.stream_of(config, brought, self.unit_encoder, *self.place.batch)

    def surveyed(self, stream: Any) -> Survey:
        found = super().surveyed(stream)
        for part in self._rows.shard.mixture.sources if self._rows is not None else ():
            for i in range(len(part)):
                found.rows, found.seen = found.rows + 1, found.seen + 1
                found.usable += self.unit_encoder.usable(part[i], found.dropped)
        return found

    # --- the reference ---------------------------------------------------------------------------

    @property
    def needs_reference(self) -> bool:
        compares = bool(self.term_weights["pair"]) or self.judged is not None
        return self.refers_all or (compares and self.config.reference.ref_mode != "none")

    @property
    def refers_all(self) -> bool:
        """Whether every sampled answer goes through the reference, not those in pairs alone."""
        return self.term_weights["kl"] > 0 or self.settings.kl_coef > 0

    def attached(self) -> list[Callable[[UnitBatch], UnitBatch]]:
        return [one for one in super().attached() if self.refers_all or one != self._with_reference]

    def support(self) -> Callable[..., Outputs]:
        sampled = super().support()

        def outputs(model: Any, hidden_TD: Any, batch: UnitBatch) -> Outputs:
            return (sampled if is_sampled(batch) else logp_outputs)(model, hidden_TD, batch)

        return outputs

    def finishing(self) -> Sequence[Callable[[Sequence[Rolled]], None]]:
        more = super().finishing()
        return (*more, self._may_win, self._refer_pairs) if self.pair_term is not None else more

    def attach(self, model: Any) -> None:
        super().attach(model)
        if self.preset.frozen_routers:
            for name, value in model.named_parameters():
                if _ROUTERS.search(name):
                    value.stop_gradient = True

    @property
    def pair_term(self) -> PairTerm | None:
        """How sampled answers are compared; None where nothing is."""
        if self.preset.rows or not self.term_weights["pair"]:
            return None
        c, s = self.config.pairs, self.config.signals
        settings = UpoSettings(
            weights={"pair": 1.0},
            hyper=hyper_of(self.config),
            reference=self.config.reference.ref_mode != "none",
            kappa=self.preset.kappa if s.kappa is None else s.kappa,
            edge_loss=s.edge_loss,
        )
        rule = PairRule(
            c.pair_mode,
            c.pair_min_gap,
            max_length_ratio=c.pair_max_length_ratio,
            max_pairs=c.pair_max,
            alpha=c.pair_alpha,
            tau=c.pair_tau,
        )
        return PairTerm(rule, settings, None if c.pair_weight == "auto" else float(c.pair_weight))

    def _may_win(self, groups: Sequence[Rolled]) -> None:
        """The better one of a pair must be complete, and of the form that is asked for."""
        for group in groups:
            form = [{**one.details, **one.parts}.get("format") for one in group.scored]
            whole = [a.finished and (f is None or f >= 1) for a, f in zip(group.answers, form, strict=True)]
            group.columns["may_win_C"] = np.array(whole, np.float64)

    def _refer_pairs(self, groups: Sequence[Rolled]) -> None:
        """What the reference says of the answers in pairs, and of no others: those get what the
        policy said, and nothing reads it.
        """
        term = self.pair_term
        if term is None or self.refers_all or self.reference is None:
            return
        size = self.settings.groups_per_batch
        for i in range(0, len(groups), size):
            part = groups[i : i + size]
            chosen = [_paired(group, term.rule) for group in part]
            if any(self.place.gather(any(len(c) for c in chosen))):  # a forward is everybody's where experts are apart
                self._refer(part, chosen)
        for group in groups:
            group.columns.setdefault("ref_logp_N", group.columns["old_logp_N"].copy())

    def _refer(self, groups: Sequence[Rolled], chosen: Sequence[np.ndarray]) -> None:
        assert self.reference is not None
        some = [c if len(c) else np.arange(1) for c in chosen]
        if any(len(c) for c in chosen):
            pairs = [(g, c) for g, c in zip(groups, chosen, strict=True) if len(c)]
        else:  # nothing here, but another rank computes
            pairs = list(zip(groups, some, strict=True))[:1]
        units = [
            dataclasses.replace(g.unit, dialogues=tuple(g.unit.dialogues[i] for i in c.tolist())) for g, c in pairs
        ]
        with self.policy.whole():
            values = self.reference.compute(collate_units(units, self.processor))
        at = 0
        for group, c in pairs:
            column = group.columns["old_logp_N"].copy()
            ends = np.cumsum(group.length_G)
            for i in c.tolist():
                first, end = int(ends[i] - group.length_G[i]), int(ends[i])
                column[first:end] = values[at : at + end - first]
                at += end - first
            group.columns["ref_logp_N"] = column

    # --- the run ---------------------------------------------------------------------------------

    def objective(self, total_steps: int, steps_per_pass: float) -> OnlineUpoObjective:
        hyper = policy_hyper(self.config, pg_loss_of(self.config, self.preset))
        policy = self.policy_objective(hyper, self.term_weights["kl"])
        rows = None
        if self.judged is not None:
            rows = UpoObjective(self.judged, RewardShift(self.config.preference.reward_shift_decay))
        return OnlineUpoObjective(policy, self.term_weights, self.pair_term, rows)

    def windows(self, stream: Any) -> Iterator[Sequence[Any]]:
        if self._rows is None:
            yield from super().windows(stream)
            return
        for sampled, judged in zip(super().windows(stream), self._rows, strict=False):
            yield [*sampled, *self._compared(judged)]

    def _compared(self, window: Sequence[UnitBatch]) -> Sequence[UnitBatch]:
        if self.reference is None:
            return window
        ready = compared_with(self.reference, self.place, window)
        objective = self.present_objective()
        assert isinstance(objective, OnlineUpoObjective)
        if objective.rows is None or not objective.rows.uses_kl:
            return ready
        how = (self.unit_encoder.collate, self.policy.forward, self.reference)
        return with_mismatched(ready, *how, self.place.batch[0], self.place.gather_batch)

    def after_step(self, record: StepRecord) -> list[Verdict]:
        r = self.config.reference
        if r.ref_model_update_steps > 0 and record.step % r.ref_model_update_steps == 0 and self.reference is not None:
            with self.policy.whole():
                self.reference.update(r.ref_model_mixup_alpha)
        return super().after_step(record)

    def measure(self, policy: Placed, rows: RowSets, output_dir: Any) -> Measure:
        return super().measure(policy, RowSets(rows.train, _of(rows.held, self._asked)), output_dir)

    def parts(self) -> Mapping[str, Stateful]:
        more: dict[str, Stateful] = {}
        if self._rows is not None:
            more["judged rows"] = StreamPart(self.place, self._rows, ROWS_FILE)
        if self.reference is not None:
            moves = self.config.reference.ref_model_update_steps > 0
            more["reference"] = ReferencePart(self.policy, self.reference, moves)
        return {**super().parts(), **more}


class UPOAgainstCritic(SampledUPO, AgainstCritic):
    """The same with a critic: answers are compared with what it expected of them, as PPO has it."""


class UPOTrainer(ByHand):
    """Learn from every kind of judgement at once. `loss_type` names a preset; `term_weights`
    changes its weights.

    Without sampling: upo_hetero (the default; pairs, rankings, ratings and labels) or mpo (0.8 DPO
    + 0.2 BCO + likelihood, 2411.10442). With answers that are sampled while it learns, as
    `RLVRTrainer` samples them: upo_online (the policy's loss, `pg_loss`, and pairs among the
    sampled answers), upo_group (the same with GSPO and rewards per token), upo_offline (the
    policy's loss, and judged rows of the data), dpo_aux (likelihood weighed by advantage, and
    judged rows). With advantage_estimator gae answers are compared with a critic.
    `reward_funcs`, `reward_weights`, `processing_class`, `peft_config`: as `RLVRTrainer`'s;
    `reward_model`: as `PPOTrainer`'s. Arguments and errors as `Trainer`'s; also ValueError for a
    policy that has not been through SFT, and for rewards where nothing is sampled.
    """

    method_class = UPO

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processor: Any = None,
        *,
        reward_funcs: Any = None,
        reward_weights: Sequence[float] | None = None,
        reward_model: Any = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        **watched: Any,
    ) -> None:
        config = args = settings_for(args, self.method_class.stages)
        if not config.samples and (reward_funcs is not None or reward_model is not None):
            preset = ",".join(config.preference.loss_type)
            name = "reward_funcs" if reward_funcs is not None else "reward_model"
            raise ValueError(
                say(
                    f"{name} must go with a loss_type that samples answers ({', '.join(SAMPLING_PRESETS)}), not {preset}; "
                    "set one of them",
                    f"{name} 须与采样回答的 loss_type（{', '.join(SAMPLING_PRESETS)}）同用，而不是 {preset}；请设其一",
                )
            )
        self.rubric: Rubric | None = None
        if config.samples:
            self.rubric = rubric_of(config, reward_funcs, reward_weights, reward_model)
        model = given_model(model, peft_config)
        super().__init__(model, args, train_dataset, eval_dataset, processor or processing_class, **watched)

    def make_method(self) -> Method:
        if self.rubric is None:
            return UPO(self.args, self.place, self.processor)
        kind = UPOAgainstCritic if self.args.policy.advantage_estimator == "gae" else SampledUPO
        return kind(self.args, self.place, self.processor, self.rubric)

    def build_loop(self, length: tuple[int, float] | None = None) -> Loop:
        length = length or self.total_steps()
        actor = super().build_loop(length)
        if not isinstance(self.method, UPOAgainstCritic):
            return actor
        return self.method.beside(actor, self.put(), length[0])


def _of(rows: Rows, wanted: Callable[[Record], bool]) -> Rows:
    """The rows of one kind."""
    return assemble.Subset(rows, [i for i in range(len(rows)) if wanted(rows[i])])


def _paired(group: Rolled, rule: PairRule) -> np.ndarray:
    """The answers of a group that are in any pair, in their order."""
    pairs = unit_pairs(group.unit, rule, group.columns["may_win_C"])
    return np.unique(np.concatenate([pairs.better_P, pairs.worse_P]))


# --- from settings -------------------------------------------------------------------------------


def learned_signals(settings: UpoSettings, known: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of judgement that terms with a weight learn from."""
    if settings.active("nll"):
        return known
    return tuple(signal for signal in known if any(settings.active(t) for t, s in _READS.items() if s == signal))


def pg_loss_of(config: RunConfig, preset: SamplingPreset) -> str:
    """The policy's loss of the term pg."""
    return preset.pg_loss if config.pairs.pg_loss == "auto" else config.pairs.pg_loss


def sampling_weights(config: RunConfig, preset: SamplingPreset) -> dict[str, float]:
    """Weights of the terms pg, pair and kl on sampled answers. Raises ValueError where nothing is
    left to learn.
    """
    given = {"pg": 0.0, "pair": 0.0, "kl": 0.0, **preset.weights, **term_weights(config)}
    if not any(given.values()):
        raise ValueError(
            say(
                "term_weights (all 0) must give at least one term a weight; there is nothing to learn otherwise",
                "term_weights（全为 0）须至少给一项权重，否则没有可学习的内容",
            )
        )
    return {name: 0.0 if preset.rows and name == "pair" else given[name] for name in ("pg", "pair", "kl")}


def row_settings(config: RunConfig, preset: SamplingPreset) -> UpoSettings | None:
    """How judged rows are learned beside sampled answers; None where the preset or its weights
    leave them out.
    """
    weights = {**preset.weights, **term_weights(config)}
    mine = {name: weight for name, weight in weights.items() if name not in ("pg", "kl")}
    if not preset.rows or not any(mine.values()):
        return None
    base = UpoSettings(weights=mine, reference=config.reference.ref_mode != "none")
    return with_settings(base, config, preset.kappa)


def upo_settings(config: RunConfig) -> UpoSettings:
    """The preset with the run's changes. Raises ValueError for unknown presets and terms."""
    p, s = config.preference, config.signals
    name = "upo_hetero" if p.loss_type == ("auto",) else ",".join(p.loss_type)
    if name not in PRESETS:
        known = ", ".join((*PRESETS, *SAMPLING_PRESETS))
        raise ValueError(
            say(
                f"loss_type ({name}) must be one of {known} at stage UPO; take upo_hetero",
                f"UPO 阶段 loss_type（{name}）须为 {known} 之一；请用 upo_hetero",
            )
        )
    preset = PRESETS[name]
    settings = with_settings(
        dataclasses.replace(preset, weights={**preset.weights, **term_weights(config)}), config, preset.kappa
    )
    if s.bco_density and not settings.active("bin"):
        raise ValueError(
            say(
                "bco_density (true) must go with a weight of the term that learns from labels (bin); "
                "raise bin in term_weights, or unset it",
                "bco_density（true）须给学习标签的项（bin）设权重；请在 term_weights 中调大 bin，或取消它",
            )
        )
    return settings


def with_settings(preset: UpoSettings, config: RunConfig, kappa: int) -> UpoSettings:
    """A preset of judged rows with what the run says of each term. `kappa`: where the run says
    nothing.
    """
    s = config.signals
    return dataclasses.replace(
        preset,
        hyper=dataclasses.replace(hyper_of(config), nll_norm=preset.hyper.nll_norm),
        kappa=kappa if s.kappa is None else s.kappa,
        edge_loss=s.edge_loss,
        rank=s.rank_loss,
        top_k=s.rank_top_k,
        rate=s.rate_loss,
        rate_tau=s.rate_tau,
        rate_margin=s.rate_margin,
        rate_alpha=s.rate_alpha,
        bin=s.bin_loss,
        edge_weight=s.edge_weight,
        desirable_weight=s.desirable_weight,
        undesirable_weight=s.undesirable_weight,
    )


def term_weights(config: RunConfig) -> dict[str, float]:
    """ "pair=1", "rank=0.5" -> weights. Raises ValueError for another form, and for terms that the
    preset cannot feed.
    """
    weights, known = {}, upo_terms(config)
    for item in config.signals.term_weights:
        term, _, number = item.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if term.strip() not in known or not 0 <= weight < float("inf"):
            raise ValueError(
                say(
                    f"term_weights ({item!r}) must look like term=weight, term one of {', '.join(known)}; "
                    f"e.g. {known[0]}=1,{known[1]}=0.5",
                    f"term_weights（{item!r}）须写成 term=weight，term 为 {', '.join(known)} 之一；例如 "
                    f"{known[0]}=1,{known[1]}=0.5",
                )
            )
        weights[term.strip()] = weight
    return weights

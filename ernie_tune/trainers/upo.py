"""`UPOTrainer`: pairs, rankings, ratings and labels in one weighted sum, each term divided by its
own global count (methods.md 7).

What is publicly known of ERNIE 4.5's UPO (Unified Preference Optimization): Baidu's README calls it
a modified reinforcement learning method, and readers' notes on the technical report describe a
pairwise preference loss, as DPO has it, added to PPO, with pairs from the current samples
("online") or made beforehand ("offline"), for stability and against reward hacking. No formula and
no weight is public. The presets here contain that sentence and are ours; they do not claim to be
Baidu's. arXiv 2405.17956 uses the same name for another method.

Refuses to know: the terms' formulas (objectives/upo.py), rollouts: the online terms (pg, kl, ent)
join the same sum where a trainer makes answers.
"""

from __future__ import annotations

import dataclasses

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.data.units import UnitEncoder
from ernie_tune.objectives.unpaired import RewardShift
from ernie_tune.objectives.upo import OFFLINE, PRESETS, UpoSettings
from ernie_tune.train.preference import UpoObjective
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.judged import ancestry
from ernie_tune.trainers.preference import PreferenceMethod, hyper_of

# methods.md 7.4: presets that sample answers while they learn
ONLINE_PRESETS = ("upo_online", "upo_offline", "upo_group", "dpo_aux")
_READS = {"pair": "pair", "bco_pair": "pair", "rank": "ranking", "rate": "rating", "bin": "label"}


class UPO(PreferenceMethod):
    """Every kind of judgement at once. Raises ValueError for a policy that has not been through
    SFT, unless allow_base.
    """

    stages = ("UPO",)

    def make_encoder(self) -> UnitEncoder:
        known, words = ancestry(self.config)
        if known is False and not self.config.signals.allow_base:
            raise ValueError(
                say(
                    f"model_name_or_path ({words}) must have been through SFT before UPO; train it on "
                    "demonstrations first, or set allow_base: true",
                    f"UPO 之前 model_name_or_path（{words}）须经过 SFT；请先用示范数据训练，或设 allow_base: true",
                )
            )
        return super().make_encoder()

    def learned(self) -> tuple[str, ...]:
        settings = upo_settings(self.config)
        if settings.active("nll"):
            return self.signals
        return tuple(
            signal for signal in self.signals if any(settings.active(t) for t, s in _READS.items() if s == signal)
        )

    def learns_pairs(self) -> bool:
        settings = upo_settings(self.config)
        return settings.active("pair") or settings.active("bco_pair")

    def objective(self, total_steps: int, steps_per_pass: float) -> UpoObjective:
        return UpoObjective(upo_settings(self.config), RewardShift(self.config.preference.reward_shift_decay))


class UPOTrainer(Trainer):
    """Learn from every kind of judgement at once. `loss_type` names a preset: upo_hetero (the
    default; pairs, rankings, ratings and labels without rollouts) or mpo (0.8 DPO + 0.2 BCO +
    likelihood, 2411.10442). `term_weights` changes weights. Arguments and errors as `Trainer`'s;
    also ValueError for a policy that has not been through SFT.
    """

    method_class = UPO


def upo_settings(config: RunConfig) -> UpoSettings:
    """The preset with the run's changes. Raises ValueError for presets and terms that do not exist,
    and for those that need rollouts.
    """
    p, s = config.preference, config.signals
    name = "upo_hetero" if p.loss_type == ("auto",) else ",".join(p.loss_type)
    if name in ONLINE_PRESETS:
        raise ValueError(
            say(
                f"loss_type ({name}) samples answers while it learns and must be one of "
                f"{', '.join(PRESETS)} here; take upo_hetero",
                f"loss_type（{name}）在学习时采样回答，此处须为 {', '.join(PRESETS)} 之一；请用 upo_hetero",
            )
        )
    if name not in PRESETS:
        raise ValueError(
            say(
                f"loss_type ({name}) must be one of {', '.join(PRESETS)} at stage UPO; take upo_hetero",
                f"UPO 阶段 loss_type（{name}）须为 {', '.join(PRESETS)} 之一；请用 upo_hetero",
            )
        )
    preset = PRESETS[name]
    settings = dataclasses.replace(
        preset,
        weights={**preset.weights, **term_weights(s.term_weights)},
        hyper=dataclasses.replace(hyper_of(config), nll_norm=preset.hyper.nll_norm),
        kappa=s.kappa,
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
    if s.bco_density and not settings.active("bin"):
        raise ValueError(
            say(
                "bco_density (true) must go with a weight of the term that learns from labels (bin); "
                "raise bin in term_weights, or unset it",
                "bco_density（true）须给学习标签的项（bin）设权重；请在 term_weights 中调大 bin，或取消它",
            )
        )
    return settings


def term_weights(given: tuple[str, ...]) -> dict[str, float]:
    """ "pair=1", "rank=0.5" -> weights. Raises ValueError for another form, and for terms that no
    data set can feed.
    """
    weights = {}
    for item in given:
        term, _, number = item.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if term.strip() not in OFFLINE or not 0 <= weight < float("inf"):
            raise ValueError(
                say(
                    f"term_weights ({item!r}) must look like term=weight, term one of {', '.join(OFFLINE)}; "
                    "e.g. pair=1,rank=0.5",
                    f"term_weights（{item!r}）须写成 term=weight，term 为 {', '.join(OFFLINE)} 之一；例如 "
                    "pair=1,rank=0.5",
                )
            )
        weights[term.strip()] = weight
    return weights

"""The one table of methods: what each stage of training learns from, which class trains it, what
its losses are called, how fast it learns.

The command line, the settings' choices and rules, the planner and the public names derive from it:
a new method is one row here and its trainer.
Refuses to know: settings, how anything is computed, paddle. `trainer` is a name; who needs the
class imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One method of training.

    `trainer`: "module:class". `signals`: kinds of judgement that its rows may carry. `samples`: it
    samples answers while it learns. `reference`: it compares with another policy. `losses`: names
    that `loss_type` takes beside "auto"; empty: it takes none. `rates`: default peak learning rate
    of full tuning, and of adapters.
    """

    name: str
    trainer: str
    signals: tuple[str, ...]
    samples: bool
    reference: bool
    help: str
    help_zh: str
    losses: tuple[str, ...] = ()
    rates: tuple[float, float] = (1e-6, 1e-5)

    @property
    def compares(self) -> bool:
        """Whether it learns from judged answers."""
        return "sft" not in self.signals and not self.samples


# Names of losses on pairs; `objectives/pairwise.py` computes them.
PAIR_LOSSES = (
    *("sigmoid", "odpo", "sigmoid_norm", "cdpo", "robust", "hinge", "ipo", "ipo_sum", "simpo", "odds", "cpo_sigmoid"),
    *("dpop", "dpop_outside", "bco_pair", "nca_pair", "exo_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("sft", "rpo", "mpo", "orpo", "cpo"),
)
EDGE_LOSSES = PAIR_LOSSES[: PAIR_LOSSES.index("sft")]
# Those that compare with no reference policy.
UNREFERENCED = ("simpo", "odds", "cpo_sigmoid", "orpo", "cpo")
LABEL_LOSSES = ("kto", "bco", "apo_zero_unpaired")
# Names of the policy's losses; `objectives/policy.py` computes them.
POLICY_LOSSES = (
    *(
        "grpo",
        "dapo",
        "bnpo",
        "dr_grpo",
        "ppo",
        "gspo",
        "gspo_token",
        "luspo",
        "cispo",
        "sapo",
        "gmpo",
        "rloo",
        "reinforce",
        "vespo",
        "awr",
    ),
)
UPO_PRESETS = ("upo_hetero", "mpo")
# that sample answers while they learn
ONLINE_PRESETS = ("upo_online", "upo_offline", "upo_group", "dpo_aux")
# Those among them that learn from judged rows beside their sampled answers.
ROW_PRESETS = ("upo_offline", "dpo_aux")
UPO_TERMS = ("pair", "bco_pair", "rank", "rate", "bin", "nll")  # that rows can feed
UPO_SAMPLED_TERMS = ("pg", "pair", "kl")  # that sampled answers feed
_TRAINERS = "ernie_tune.trainers"
_ASKED = ("verifiable", "prompt")  # rows that are answered by sampling
# Published recipes of ERNIEKit: demonstrations, and answers that are compared.
_TAUGHT = (1e-5, 3e-4)

_ALL = (
    Stage(
        "SFT",
        f"{_TRAINERS}.sft:SFTTrainer",
        ("sft",),
        samples=False,
        reference=False,
        help="learn from demonstrations: dialogues with the answers to give",
        help_zh="有监督微调：从示范对话学习",
        rates=_TAUGHT,
    ),
    Stage(
        "DPO",
        f"{_TRAINERS}.preference:DPOTrainer",
        ("pair", "ranking", "rating"),
        samples=False,
        reference=True,
        help="learn from pairs of answers, rankings and ratings",
        help_zh="从成对回答、排序与评分学习",
        losses=PAIR_LOSSES,
    ),
    Stage(
        "KTO",
        f"{_TRAINERS}.preference:KTOTrainer",
        ("label",),
        samples=False,
        reference=True,
        help="learn from single answers called good or bad",
        help_zh="从标为好或坏的单个回答学习",
        losses=LABEL_LOSSES,
    ),
    Stage(
        "UPO",
        f"{_TRAINERS}.upo:UPOTrainer",
        ("pair", "ranking", "rating", "label"),
        samples=False,
        reference=True,
        help="learn from pairs, rankings, ratings and labels together",
        help_zh="同时从成对、排序、评分与标签学习",
        losses=(*UPO_PRESETS, *ONLINE_PRESETS),
    ),
    Stage(
        "RLVR",
        f"{_TRAINERS}.online:RLVRTrainer",
        ("verifiable", "prompt"),
        samples=True,
        reference=True,
        help="sample answers and learn from rewards that can be checked",
        help_zh="采样回答，从可验证的奖励学习",
        losses=POLICY_LOSSES,
    ),
    Stage(
        "PT",
        f"{_TRAINERS}.sft:PretrainTrainer",
        ("sft", "text"),
        samples=False,
        reference=False,
        help="go on with pre-training: learn all of plain texts, and answers in dialogues",
        help_zh="继续预训练：学习整段纯文本，以及对话中的回答",
        rates=_TAUGHT,
    ),
    Stage(
        "RM",
        f"{_TRAINERS}.reward:RewardTrainer",
        ("pair", "ranking", "rating"),
        samples=False,
        reference=False,
        help="train a reward model on pairs, rankings and ratings",
        help_zh="用成对、排序与评分训练奖励模型",
    ),
    Stage(
        "PPO",
        f"{_TRAINERS}.ppo:PPOTrainer",
        ("verifiable", "prompt"),
        samples=True,
        reference=True,
        help="sample answers and learn from a reward model or checkers, with a critic",
        help_zh="采样回答，从奖励模型或检查器学习，带价值网络",
        losses=POLICY_LOSSES,
    ),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _ALL}


def samples(stage: str, losses: Sequence[str]) -> bool:
    """Whether a run of this stage and `loss_type` samples answers while it learns."""
    return STAGES[stage].samples or (stage == "UPO" and bool(set(losses) & set(ONLINE_PRESETS)))


def signals_of(stage: str, losses: Sequence[str]) -> tuple[str, ...]:
    """The kinds of rows that a run of this stage and `loss_type` learns from."""
    known = STAGES[stage].signals
    if stage != "UPO" or not samples(stage, losses):
        return known
    return (*_ASKED, *(known if set(losses) & set(ROW_PRESETS) else ()))

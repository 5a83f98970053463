"""Settings of methods that learn from judged or sampled answers: objectives, references, kinds of
judgement, rollouts. Sections of at most 20 fields.

Refuses to know: other spellings (aliases.py), where a value was written (loader.py), which values
fit together (checks.py), paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_tune.config.field import arg

F_DIVERGENCES = {
    "reverse_kl": ("KL of the policy from the reference", "策略相对参考的 KL"),
    "forward_kl": ("KL of the reference from the policy", "参考相对策略的 KL"),
    "js_divergence": ("Jensen-Shannon", "Jensen-Shannon 散度"),
    "alpha_divergence": ("between both, by f_alpha_divergence_coef", "介于两者之间，由 f_alpha_divergence_coef 决定"),
}
CORRUPTIONS = {
    "none": ("no such pairs", "不制作"),
    "mask": ("a grey picture", "灰色图片"),
    "noise": ("the picture under noise", "加噪声的图片"),
}
REF_MODES = {
    "auto": ("the adapter's absence or copy, else a copy of the model", "关闭适配器或其副本，否则为模型副本"),
    "model": ("a frozen copy of the model", "冻结的模型副本"),
    "adapter_off": ("the base without its adapter", "关闭适配器的基座"),
    "adapter_ref": ("a frozen copy of the adapter", "冻结的适配器副本"),
    "precomputed": ("a file of log-probabilities", "预先算好的对数概率文件"),
    "none": ("no reference; for losses that need none", "无参考；仅用于不需要参考的损失"),
}
_DPO = ("DPO",)
_UPO = ("UPO",)
_RM = ("RM",)
_PAIRS = ("DPO", "UPO")
_SCORED = ("DPO", "RM")
_REFERRED = ("DPO", "KTO", "UPO")
_COMPARED = (*_REFERRED, "RLVR", "PPO")
_LABELS = ("KTO", "UPO")
_PICTURES = ("DPO", "UPO", "RM")
_JUDGED = ("DPO", "KTO", "UPO", "RM")
_PROMPTED = (*_JUDGED, "RLVR", "PPO")
_SAMPLED = ("RLVR", "PPO")


@dataclass(frozen=True)
class PreferenceArguments:
    """Objectives that compare answers. Every stage but SFT and PT."""

    beta: float = arg(
        0.1, "weight of the distance to the reference", "与参考距离的权重", low=0, stages=(*_REFERRED, *_SAMPLED)
    )
    loss_type: tuple[str, ...] = arg(
        ("auto",),
        "objective, or several, comma separated; auto: that of the stage",
        "目标函数，可多个，逗号分隔；auto 表示该阶段的默认",
        stages=_PROMPTED,
    )
    loss_weights: tuple[float, ...] = arg(
        (), "weights of several objectives; empty: 1 each", "多个目标的权重；空表示各为 1", low=0, stages=_DPO
    )
    label_smoothing: float = arg(
        0.0,
        "share of pairs judged wrongly (cdpo, robust, exo_pair)",
        "判错的成对比例（cdpo、robust、exo_pair）",
        low=0,
        high=0.49,
        stages=_PAIRS,
        losses=("cdpo", "robust", "exo_pair"),
    )
    simpo_gamma: float = arg(0.5, "target margin of SimPO", "SimPO 的目标间隔", low=0, stages=_PAIRS, losses=("simpo",))
    dpop_lambda: float = arg(
        50.0, "penalty of DPOP", "DPOP 的惩罚系数", low=0, stages=_PAIRS, losses=("dpop", "dpop_outside")
    )
    offset_alpha: float = arg(
        0.0, "margin from scores, times their difference", "由评分差得到的间隔的系数", low=0, stages=_SCORED
    )
    offset_type: str = arg(
        "linear",
        "what of the scores' difference makes the margin",
        "评分差如何变为间隔",
        {"linear": ("the difference", "差值"), "log": ("its logarithm", "差值的对数")},
        stages=_SCORED,
    )
    ld_alpha: float = arg(
        1.0,
        "weight of tokens beyond the shorter answer (LD-DPO)",
        "超出较短回答的 token 的权重（LD-DPO）",
        low=0,
        high=1,
        stages=_DPO,
    )
    f_divergence_type: str = arg("reverse_kl", "distance to the reference", "与参考的距离", F_DIVERGENCES, stages=_DPO)
    f_alpha_divergence_coef: float = arg(
        0.5,
        "alpha of the alpha_divergence; 1 is reverse_kl, 0 forward_kl",
        "alpha 散度的 alpha；1 为 reverse_kl，0 为 forward_kl",
        stages=_DPO,
        needs=("f_divergence_type", ("alpha_divergence",)),
    )
    use_weighting: bool = arg(
        False,
        "weigh pairs by how probable both answers are for the policy (WPO)",
        "按策略对两个回答的概率加权（WPO）",
        stages=_DPO,
    )
    pref_loss_ratio: float = arg(1.0, "weight of the preference loss", "偏好损失的权重", low=0, stages=_DPO)
    sft_loss_ratio: float = arg(
        0.0, "weight of the likelihood of the chosen answer", "优选回答似然的权重", low=0, stages=_DPO
    )
    sft_loss_norm: str = arg(
        "token",
        "what that likelihood is averaged over: tokens, or answers",
        "该似然按什么求平均",
        {"token": ("tokens", "token"), "seq": ("answers", "回答")},
        stages=_DPO,
    )
    reward_shift_decay: float | None = arg(
        None,
        "decay of the mean rewards that BCO compares with; null: means over the whole run",
        "BCO 所比较的平均奖励的衰减；null 表示整个运行的平均",
        low=0,
        high=0.9999,
        stages=_REFERRED,
    )
    max_prompt_len: int = arg(
        2048,
        "tokens of the prompt, at most; if not given, below max_seq_len",
        "提示最多的 token 数；未给出时小于 max_seq_len",
        low=1,
        stages=_PROMPTED,
    )
    prefix_sharing: bool = arg(
        True,
        "compute what the answers to a prompt have in common once",
        "同一提示的多个回答的共同部分只算一次",
        stages=_PROMPTED,
        shapes=False,
    )


@dataclass(frozen=True)
class PictureArguments:
    """Pairs made of a row's own picture: the right answer to the true one over the same answer to a
    spoilt one. Stages DPO, UPO and RM.
    """

    image_corruption: str = arg(
        "none",
        "add pairs whose worse side is the right answer to a spoilt picture",
        "加入以损坏图片的正确回答为劣方的成对数据",
        CORRUPTIONS,
        stages=_PICTURES,
    )
    image_corruption_ratio: float = arg(
        1.0,
        "share of the training rows with pictures that get such a pair",
        "有图训练行中制作这种成对数据的比例",
        low=0.0001,
        high=1,
        stages=_PICTURES,
        needs=("image_corruption", ("mask", "noise")),
    )
    image_corruption_noise: float = arg(
        0.99,
        "share of noise in the standard deviation of a spoilt picture; 1: nothing else",
        "损坏图片标准差中噪声的比例；1 表示只有噪声",
        low=0.01,
        high=1,
        stages=_PICTURES,
        needs=("image_corruption", ("noise",)),
    )


@dataclass(frozen=True)
class ReferenceArguments:
    """The policy that answers are compared with. Stages DPO, KTO and UPO."""

    reference_free: bool = arg(
        False, "no reference model; only with losses that need none", "无参考模型；仅用于不需要参考的损失", stages=_DPO
    )
    ref_mode: str = arg("auto", "where the reference comes from", "参考从何而来", REF_MODES, stages=_COMPARED)
    ref_logps_path: str = arg(
        "",
        "file of the precomputed reference; empty: output_dir/reference_logps.npz",
        "预先算好的参考文件；空表示 output_dir/reference_logps.npz",
        stages=_REFERRED,
    )
    ref_model_update_steps: int = arg(
        -1,
        "steps between updates of the reference (TR-DPO); -1: never",
        "更新参考的间隔步数（TR-DPO）；-1 表示从不",
        low=-1,
        stages=_REFERRED,
    )
    ref_model_mixup_alpha: float = arg(
        0.6,
        "share of the policy in an updated reference; 1: a copy",
        "更新后的参考中策略的比例；1 表示复制",
        low=0.0001,
        high=1,
        stages=_REFERRED,
    )


@dataclass(frozen=True)
class SignalArguments:
    """How each kind of judgement is learned. Stages KTO, UPO and RM."""

    term_weights: tuple[str, ...] = arg(
        (),
        "weights of UPO's terms over the preset's, as pair=1,rank=0.5,rate=0.5,bin=0.25,nll=0.1; pg and kl where answers are sampled",
        "UPO 各项的权重，如 pair=1,rank=0.5,rate=0.5,bin=0.25,nll=0.1；采样回答时还有 pg 和 kl",
        stages=_UPO,
    )
    kappa: int | None = arg(
        None,
        "1: implicit rewards per token of the answer; null: 0, 1 for upo_group",
        "1：隐式奖励按回答 token 数平均；null：0，upo_group 为 1",
        low=0,
        high=1,
        stages=_UPO,
    )
    rank_loss: str = arg(
        "plackett_luce",
        "how rankings are learned",
        "如何学习排序",
        {
            "plackett_luce": ("as one choice after another", "逐次选择"),
            "edges": ("as all their pairs", "全部成对"),
            "lipo_lambda": ("pairs weighed by their ranks (LiPO)", "按名次加权的成对（LiPO）"),
        },
        stages=_UPO,
    )
    rate_loss: str = arg(
        "soft_bt",
        "how ratings are learned",
        "如何学习评分",
        {
            "soft_bt": ("pairs, each right with a probability", "成对，各有正确概率"),
            "margin": ("pairs with a margin from the scores", "带评分间隔的成对"),
            "infonca": ("as a distribution over the answers", "作为回答上的分布"),
            "bernoulli_kl": ("each answer for itself", "逐个回答"),
        },
        stages=_UPO,
    )
    rank_top_k: int | None = arg(
        None,
        "best tiers of a ranking that plackett_luce learns; null: all",
        "plackett_luce 学习的最前名次数；null 表示全部",
        low=1,
        stages=_UPO,
        needs=("rank_loss", ("plackett_luce",)),
    )
    rate_tau: float = arg(
        1.0,
        "softness of soft_bt and bernoulli_kl, in units of the whole scale",
        "soft_bt 与 bernoulli_kl 的平滑度，以整个评分范围为单位",
        low=0.0001,
        stages=_UPO,
        needs=("rate_loss", ("soft_bt", "bernoulli_kl")),
    )
    rate_margin: str = arg(
        "linear",
        "what of the scores' difference is the margin of rate_loss margin",
        "rate_loss margin 的间隔如何由评分差得到",
        {"linear": ("the difference", "差值"), "log": ("its logarithm", "差值的对数")},
        stages=_UPO,
        needs=("rate_loss", ("margin",)),
    )
    rate_alpha: float = arg(
        1.0,
        "factor of that margin; temperature of the scores of infonca",
        "该间隔的系数；infonca 评分的温度",
        low=0.0001,
        stages=_UPO,
        needs=("rate_loss", ("margin", "infonca")),
    )
    edge_loss: str = arg(
        "sigmoid",
        "loss of a comparison: sigmoid, or another of DPO's that compares two answers",
        "一次比较的损失：sigmoid，或 DPO 的其他成对损失",
        stages=_UPO,
    )
    bin_loss: str = arg(
        "kto",
        "how labels are learned",
        "如何学习好坏标签",
        {
            "kto": ("against the mean distance to the reference", "与到参考的平均距离比较"),
            "bco": ("as a classifier", "作为分类器"),
            "apo_zero_unpaired": ("good up, bad down", "好者升、坏者降"),
        },
        stages=_UPO,
    )
    edge_weight: str = arg(
        "unit",
        "what counts as one",
        "以什么计为一",
        {"unit": ("a row", "一行"), "edge": ("each comparison in it", "其中每次比较")},
        stages=("UPO", "RM"),
    )
    desirable_weight: float = arg(1.0, "weight of good answers", "好回答的权重", low=0, stages=_LABELS)
    undesirable_weight: float = arg(1.0, "weight of bad answers", "坏回答的权重", low=0, stages=_LABELS)
    bco_density: bool = arg(
        False,
        "weigh bad answers by how like those of good ones their prompts are (BCO's distribution matching)",
        "按提示与好回答提示的相似度为坏回答加权（BCO 的分布匹配）",
        stages=_LABELS,
    )
    bco_density_min: float = arg(0.5, "least such weight", "该权重的下限", low=0, stages=_LABELS)
    bco_density_max: float = arg(10.0, "largest such weight", "该权重的上限", low=0, stages=_LABELS)
    rating_loss: str = arg(
        "pairs",
        "how ratings teach a reward model",
        "评分如何教奖励模型",
        {
            "pairs": ("by comparison", "通过比较"),
            "regression": ("as its values", "作为其输出值"),
            "ordinal": ("as levels between learned cuts", "作为学得分界之间的等级"),
        },
        stages=_RM,
    )
    rating_levels: int = arg(
        5,
        "values that ratings have, evenly spaced",
        "评分取值的个数，等距",
        low=2,
        stages=_RM,
        needs=("rating_loss", ("ordinal",)),
    )
    center_rewards_coefficient: float = arg(0.01, "pull of rewards towards 0", "把奖励拉向 0 的力度", low=0, stages=_RM)
    allow_base: bool = arg(
        False,
        "let UPO start from a model without an SFT ancestor",
        "允许 UPO 从未经 SFT 的模型开始",
        stages=_UPO,
        shapes=False,
    )

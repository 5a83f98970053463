"""Settings of methods that sample answers while they learn: rollouts, rewards, the policy's loss,
the critic. Sections of at most 20 fields.

Names are TRL's where it has them. Refuses to know: other spellings (aliases.py), where a value was
written (loader.py), which values fit together (checks.py), paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_tune.config.field import arg
from ernie_tune.config.stages import POLICY_LOSSES

_RL = ("RLVR", "PPO", "UPO")
_RLVR = ("RLVR", "UPO")
_UPO = ("UPO",)
_PPO = ("PPO", "UPO")  # UPO with advantage_estimator gae
ESTIMATORS = {
    "auto": ("grpo; gae at stage PPO", "grpo；PPO 阶段为 gae"),
    "grpo": ("relative to the answers of the same prompt", "相对同一提示的其他回答"),
    "rloo": ("relative to the other answers of the prompt", "相对该提示的其余回答"),
    "max_rl": ("relative to the prompt's mean reward", "相对该提示的平均奖励"),
    "reinforce_plus_plus": ("returns whitened over the batch", "整批白化的回报"),
    "reinforce_plus_plus_baseline": ("less the prompt's mean, whitened over the batch", "减去提示均值后整批白化"),
    "gae": ("against a critic (stages PPO and UPO)", "相对价值网络（PPO 与 UPO 阶段）"),
}
CORRECTIONS = {
    "auto": ("icepop where the trainer computes its own", "训练自行计算时用 icepop"),
    "none": ("no correction", "不修正"),
    "tis_token": ("ratios cut above", "截断比率"),
    "icepop": ("tokens outside the bounds are left out", "去除越界 token"),
    "tis_sequence": ("answers' ratios cut above", "截断整个回答的比率"),
    "mask_sequence": ("answers above are left out", "去除越界回答"),
    "geometric": ("answers whose mean ratio is outside are left out", "去除平均比率越界的回答"),
}


# What `reward_funcs` takes by name: what each row names, and the checkers of rewards/verifiers.py.
CHECKERS = (
    *("row", "numeric", "math", "choice", "mcq", "count", "exact", "anls", "ocr_ned", "chart", "chart_value", "box"),
    *("box_iou", "boxes", "kie", "json_schema", "table", "date", "evidence", "redraw", "zoom", "format", "language"),
    *("repetition", "length"),
)


@dataclass(frozen=True)
class RolloutArguments:
    """Sampled answers and their rewards. Stages RLVR and PPO, and UPO where its preset samples
    answers.
    """

    num_generations: int = arg(8, "answers sampled a prompt", "每个提示采样的回答数", low=1, stages=_RL)
    max_completion_length: int = arg(
        512, "tokens sampled an answer, at most", "每个采样回答最多的 token 数", low=1, stages=_RL
    )
    temperature: float = arg(1.0, "sampling temperature", "采样温度", low=0.01, stages=_RL)
    top_p: float = arg(
        1.0,
        "nucleus that is sampled from; below 1 with keep_sampling_mask only",
        "核采样的概率和；仅在 keep_sampling_mask 下可小于 1",
        low=0.01,
        high=1,
        stages=_RL,
    )
    top_k: int = arg(
        0,
        "likeliest tokens that are sampled from; other than 0 (all) with keep_sampling_mask only",
        "只从最可能的若干 token 采样；仅在 keep_sampling_mask 下可不为 0（全部）",
        low=0,
        stages=_RL,
    )
    num_iterations: int = arg(1, "passes over one round of answers", "对一轮回答训练的遍数", low=1, stages=_RL)
    num_mini_batches: int = arg(1, "optimizer steps a pass", "每遍的优化步数", low=1, stages=_RL)
    dynamic_sample: bool = arg(
        True,
        "replace prompts whose answers all earn the same",
        "替换所有回答奖励相同的提示",
        stages=_RLVR,
    )
    max_resample_times: int = arg(3, "how often, at most", "最多替换次数", low=0, stages=_RLVR)
    router_replay: str = arg(
        "auto",
        "let routers choose again what they chose before",
        "让路由重现之前的选择",
        {
            "auto": ("R3 with several updates a round, else off", "每轮多次更新时为 R3，否则关闭"),
            "off": ("routers choose anew", "路由重新选择"),
            "R2": (
                "what they chose for the policy that sampled, in a pass of the trainer",
                "采样策略在训练器前向中的选择",
            ),
            "R3": ("what they chose while sampling", "采样时的选择"),
        },
        stages=_RL,
    )
    difficulty_sampler: bool = arg(
        False, "draw prompts that are neither solved nor hopeless more often", "更常抽取难度适中的提示", stages=_RL
    )
    reward_funcs: tuple[str, ...] = arg(
        (),
        "rewards, comma separated: names of checkers, row (what each row names), file.py:function, folders of reward "
        "models, judge:http://HOST/v1 (an OpenAI-compatible address); empty: what each row names",
        "奖励，逗号分隔：检查器名、row（由每行指定）、file.py:function、奖励模型目录或 judge:http://…（OpenAI 兼容地址）；空表示由每行指定",
        stages=_RL,
    )
    reward_weights: tuple[float, ...] = arg(
        (), "one weight a reward, reward_model's last", "每个奖励一个权重，reward_model 的在最后", stages=_RL
    )
    reward_aggregation: str = arg(
        "sum_then_normalize",
        "how several rewards become one",
        "多个奖励如何合并",
        {
            "sum_then_normalize": ("summed, then compared", "先求和再比较"),
            "normalize_then_sum": ("each compared, then summed (GDPO)", "各自比较后求和（GDPO）"),
        },
        stages=_RLVR,
    )
    reward_error: str = arg(
        "raise",
        "what an error in a reward function does",
        "奖励函数出错时的处理",
        {"raise": ("ends the run", "结束运行"), "none": ("leaves the answers out, counted", "忽略这些回答并计数")},
        stages=_RL,
    )
    reward_check: bool = arg(
        True,
        "ask each reward function twice at the start, to find chance",
        "开始时对奖励函数询问两次，以发现随机性",
        stages=_RL,
        shapes=False,
    )
    reward_timeout_seconds: float = arg(
        60.0,
        "time of an async reward function, whose answers count for nothing after it; of another one the log speaks then",
        "异步奖励函数的时限（秒），超时的回答不计；其他奖励函数超过时在日志中提示",
        low=0.01,
        stages=_RL,
    )
    log_completions: bool = arg(
        True,
        "write every answer with its rewards to rollouts.jsonl",
        "把每个回答及其奖励写入 rollouts.jsonl",
        stages=_RL,
        shapes=False,
    )
    num_completions_to_print: int = arg(
        2, "answers shown in the log at each logged step", "每次记录时显示的回答数", low=0, stages=_RL, shapes=False
    )


@dataclass(frozen=True)
class PolicyArguments:
    """The policy's loss. Stages RLVR and PPO, and UPO where its preset samples answers."""

    advantage_estimator: str = arg("auto", "what answers are compared with", "回答与什么比较", ESTIMATORS, stages=_RL)
    scale_rewards: str = arg(
        "group",
        "what rewards are divided by",
        "奖励除以什么",
        {
            "group": ("the spread of the prompt's answers", "该提示回答的标准差"),
            "batch": ("the spread of the batch", "整批的标准差"),
            "none": ("nothing (Dr.GRPO)", "不除（Dr.GRPO）"),
        },
        stages=_RLVR,
    )
    loss_agg: str = arg(
        "auto",
        "how tokens become one loss; auto: as the loss's paper",
        "token 如何合成损失；auto：按论文",
        {
            "auto": ("as the loss's paper", "按论文"),
            "seq_mean": ("mean over answers of their mean", "回答均值的均值"),
            "token": ("mean over tokens", "token 均值"),
            "fixed": ("over answers times max_completion_length", "除以回答数乘 max_completion_length"),
            "seq_sum": ("mean over answers of their sum", "回答之和的均值"),
        },
        stages=_RL,
    )
    epsilon: float | None = arg(
        None,
        "lower clip of the probability ratio; null: 0.2, 3e-4 for gspo",
        "概率比的下裁剪；null：0.2，gspo 为 3e-4",
        low=1e-9,
        stages=_RL,
    )
    epsilon_high: float | None = arg(
        None,
        "upper clip; null: 0.28 (0.2 for ppo), 4e-4 for gspo",
        "上裁剪；null：0.28（ppo 为 0.2），gspo 为 4e-4",
        low=1e-9,
        stages=_RL,
    )
    delta: float | None = arg(None, "cap of the unclipped ratio", "未裁剪比率的上限", low=1, stages=_RL)
    dual_clip: float | None = arg(None, "bound of the loss of bad answers", "差回答损失的界", low=1, stages=_RL)
    cispo_cap: float = arg(
        5.0,
        "bound of CISPO's weight, the ratio itself",
        "CISPO 权重（比率本身）的上限",
        low=0.01,
        stages=_RL,
        losses=("cispo",),
    )
    sapo_temperature_pos: float = arg(
        1.0, "SAPO's temperature of good answers", "SAPO 对好回答的温度", low=0.01, stages=_RL, losses=("sapo",)
    )
    sapo_temperature_neg: float = arg(
        1.05, "SAPO's temperature of bad answers", "SAPO 对差回答的温度", low=0.01, stages=_RL, losses=("sapo",)
    )
    off_policy_mask_threshold: float | None = arg(
        None,
        "leave out bad answers that became less likely by more nats a token",
        "去除每 token 概率降低超过此值（nat）的差回答",
        low=0,
        stages=_RL,
    )
    kl_type: str = arg(
        "k3_is",
        "estimator of the distance to the reference",
        "与参考距离的估计",
        {
            "k1": ("log-ratio; as a loss it teaches nothing", "对数比；作为损失不起作用"),
            "k2": ("half its square", "其平方的一半"),
            "k3": ("never negative", "恒非负"),
            "k3_is": ("k3 times the ratio: the gradient of the KL", "k3 乘比率：KL 的梯度"),
        },
        stages=_RL,
    )
    kl_coef: float | None = arg(
        None,
        "KL penalty in the reward; null: 0 (0.05 at stage PPO)",
        "奖励中的 KL 惩罚；null：0（PPO 为 0.05）",
        low=0,
        stages=_RL,
    )
    mask_truncated_completions: bool = arg(
        False, "leave answers that were cut off out of the loss", "损失中去除被截断的回答", stages=_RL
    )
    overlong_buffer: int = arg(
        0,
        "tokens before the limit from which length is punished",
        "接近上限时开始惩罚长度的 token 数",
        low=0,
        stages=_RL,
    )
    overlong_penalty: float = arg(1.0, "the whole of that punishment", "该惩罚的总量", low=0, stages=_RL)
    entropy_coef: float = arg(0.0, "reward of uncertainty", "对不确定性的奖励", low=0, stages=_RL)
    use_adaptive_entropy: bool = arg(
        False, "move entropy_coef towards entropy_target", "使 entropy_coef 趋向 entropy_target", stages=_RL
    )
    entropy_target: float = arg(0.2, "entropy to keep, nats a token", "保持的熵（每 token nat）", low=0, stages=_RL)
    rollout_is: str = arg(
        "auto",
        "correction of what sampling and training see differently",
        "采样与训练差异的修正",
        CORRECTIONS,
        stages=_RL,
    )


@dataclass(frozen=True)
class MismatchArguments:
    """Whether sampling and training see one policy. Stages that sample answers."""

    old_logps: str = arg(
        "auto",
        "log-probabilities of before: whose",
        "更新前的对数概率由谁给出",
        {
            "auto": ("the engine's, until they differ from the trainer's", "采样引擎；与训练不一致后由训练计算"),
            "rollout": ("the engine's, until they differ from the trainer's", "采样引擎；与训练不一致后由训练计算"),
            "recompute": ("the trainer's own, one forward more", "训练自行计算，多一次前向"),
        },
        stages=_RL,
    )
    mismatch_every: int = arg(
        20, "rounds between two comparisons of both", "两次比较之间的轮数", low=1, stages=_RL, shapes=False
    )
    mismatch_gate: float | None = arg(
        None,
        "how far one token's may differ, in nats; null: 1e-5 (0.5 in bfloat16)",
        "单个 token 允许的差（nat）；null：1e-5（bfloat16 为 0.5）",
        low=0,
        stages=_RL,
    )
    rollout_is_min: float | None = arg(
        None,
        "lower bound of rollout_is; null: 0.5 for icepop",
        "rollout_is 的下界；null：icepop 为 0.5",
        low=0,
        stages=_RL,
    )
    rollout_is_max: float | None = arg(
        None,
        "upper bound; null: 5 for icepop, 2 for tis_token, 3 for sequences",
        "上界；null：icepop 为 5，tis_token 为 2，序列为 3",
        low=0,
        stages=_RL,
    )
    steps_per_generation: int | None = arg(
        None,
        "micro-batches that one round of answers fills on a device (TRL); null: gradient_accumulation_steps times num_mini_batches",
        "每设备一轮回答填充的微批数（TRL）；null：gradient_accumulation_steps × num_mini_batches",
        low=1,
        stages=_RL,
    )
    generation_batch_size: int | None = arg(
        None,
        "answers of one round over all devices (TRL); null: as the batch sizes give it",
        "全部设备一轮的回答数（TRL）；null：由批大小决定",
        low=1,
        stages=_RL,
    )
    importance_sampling_level: str = arg(
        "auto",
        "what has one ratio; sequence with grpo or dapo is gspo",
        "比率的粒度；sequence 配 grpo 或 dapo 即 gspo",
        {
            "auto": ("as loss_type has it", "由 loss_type 决定"),
            "token": ("each token", "每个 token"),
            "sequence": ("each answer", "每个回答"),
        },
        stages=_RL,
    )
    repetition_penalty: float = arg(
        1.0, "only 1 while learning: training does not see it", "学习时只能为 1：训练看不到它", low=0.01, stages=_RL
    )


@dataclass(frozen=True)
class CriticArguments:
    """The critic, its returns and the reward model. Stage PPO."""

    reward_model: str = arg(
        "",
        "folder of a reward model that scores answers, beside reward_funcs",
        "给回答打分的奖励模型目录，与 reward_funcs 并用",
        stages=_PPO,
    )
    value_model: str = arg(
        "auto",
        "what the critic starts from: auto (the reward model where it fits, else the policy), policy, or a reward "
        "model's folder",
        "价值网络的起点：auto（合适时为奖励模型，否则为策略）、policy，或奖励模型目录",
        stages=_PPO,
    )
    gamma: float = arg(1.0, "discount of later rewards", "后续奖励的折扣", low=0, high=1, stages=_PPO)
    lam: float = arg(0.95, "lambda of generalised advantages", "广义优势估计的 lambda", low=0, high=1, stages=_PPO)
    vf_coef: float = arg(0.1, "weight of the critic's loss", "价值损失的权重", low=0, stages=_PPO)
    cliprange_value: float = arg(
        0.2,
        "how far values may move from before; 0: any distance",
        "价值相对之前的最大变化；0 表示不限",
        low=0,
        stages=_PPO,
    )
    normalize_values: bool | None = arg(
        None,
        "let the critic learn returns less their mean over their deviation, over all rounds so far; null: unless it "
        "starts from a reward model, which says returns as they are",
        "价值网络学习标准化的回报（减去迄今各轮的均值，除以标准差）；null：除非起点是奖励模型（其输出即为原始回报）",
        stages=_PPO,
    )
    whiten_rewards: bool = arg(False, "scale rewards to unit spread", "把奖励缩放到单位方差", stages=_PPO)
    missing_eos_penalty: float | None = arg(
        None, "taken from answers that do not end", "未结束的回答扣除的奖励", low=0, stages=_PPO
    )
    kl_target: float | None = arg(
        None,
        "KL an answer, in nats, that kl_coef is steered to; null: fixed",
        "kl_coef 所调节到的每个回答的 KL（nat）；null：固定",
        low=0.0001,
        stages=_PPO,
    )
    kl_horizon: int = arg(10_000, "answers over which it is steered", "调节的回答数", low=1, stages=_PPO)
    critic_warmup: int = arg(0, "steps in which the critic alone learns", "只训练价值网络的步数", low=0, stages=_PPO)
    value_learning_rate: float | None = arg(
        None,
        "the critic's rate; null: 10 times learning_rate",
        "价值网络学习率；null：learning_rate 的 10 倍",
        low=0,
        stages=_PPO,
    )


@dataclass(frozen=True)
class PairArguments:
    """Pairs among the sampled answers to a prompt, and what they are added to. Stage UPO with a
    preset that samples.
    """

    pg_loss: str = arg(
        "auto",
        "the policy's loss of the term pg; auto: ppo, gspo for upo_group, awr for dpo_aux",
        "pg 项的策略损失；auto：ppo，upo_group 为 gspo，dpo_aux 为 awr",
        ("auto", *POLICY_LOSSES),
        stages=_UPO,
    )
    pair_mode: str = arg(
        "best_worst",
        "which of a prompt's answers make pairs",
        "同一提示的哪些回答组成对",
        {
            "best_worst": ("the best and the worst", "最好与最差"),
            "best_vs_worsts": ("the best and each of the lowest reward", "最好与奖励最低的每一个"),
            "all_pairs": ("all that differ enough", "差距足够的全部"),
            "correct_vs_wrong": ("rewards of 1 and more, and of 0 and less", "奖励不小于 1 的与不大于 0 的"),
        },
        stages=_UPO,
    )
    pair_min_gap: float = arg(0.25, "least difference of their rewards", "奖励之差的下限", low=1e-9, stages=_UPO)
    pair_max: int = arg(4, "pairs a prompt, at most", "每个提示最多的对数", low=1, stages=_UPO)
    pair_max_length_ratio: float | None = arg(
        None, "bound of the longer over the shorter answer", "较长与较短回答长度之比的上限", low=1, stages=_UPO
    )
    pair_alpha: float = arg(
        0.0, "margin, times the difference of rewards", "奖励差乘此系数作为间隔", low=0, stages=_UPO
    )
    pair_tau: float | None = arg(
        None,
        "softness of the preference: it is right with probability sigmoid(difference / tau); null: certain",
        "偏好的平滑度：以 sigmoid(差值 / tau) 的概率成立；null：必然成立",
        low=1e-9,
        stages=_UPO,
    )
    pair_weight: str = arg(
        "1.0",
        "factor of the pair term: a number, or auto: its pull on a token is a fifth of that of pg at the reference",
        "pair 项的系数：数值，或 auto：在参考处对 token 的作用为 pg 的五分之一",
        stages=_UPO,
    )


@dataclass(frozen=True)
class TeacherArguments:
    """A teacher that says of every sampled token how likely it would have been (on-policy
    distillation). Stage RLVR.
    """

    teacher_model: str = arg(
        "",
        "teacher of sampled answers: a folder, base (the model without its adapter) or self; empty: none",
        "采样回答的教师：目录、base（去掉适配器的模型）或 self；空表示没有",
        stages=("RLVR",),
    )
    teacher_kl_coef: float = arg(
        0.0,
        "what the teacher's log-probability less the policy's adds to a token's advantage",
        "教师与策略对数概率之差加入 token 优势的系数",
        low=0,
        stages=("RLVR",),
    )
    distill_coef: float | None = arg(
        None,
        "weight of the distance of whole next-token distributions; null: 1 where teacher_kl_coef is 0",
        "整个下一 token 分布之间距离的权重；null：teacher_kl_coef 为 0 时取 1",
        low=0,
        stages=("RLVR",),
    )
    distill_beta: float = arg(
        1.0,
        "that distance: 0 forward KL, 1 reverse KL, between them Jensen-Shannon",
        "该距离：0 为前向 KL，1 为反向 KL，其间为 Jensen-Shannon",
        low=0,
        high=1,
        stages=("RLVR",),
    )
    distill_lmbda: float = arg(
        1.0,
        "share of steps on sampled answers; the others read demonstrations (sft rows)",
        "使用采样回答的步的比例；其余步读取示范（sft 数据）",
        low=0,
        high=1,
        stages=("RLVR",),
    )
    teacher_hint: bool = arg(
        False,
        "show the teacher each row's hint, which the policy does not see",
        "让教师看到每行的 hint，而策略看不到",
        stages=("RLVR",),
    )

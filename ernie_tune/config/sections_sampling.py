"""Settings of sampled answers beyond the usual ones: where an answer ends, which of them and of
their tokens are learned from, and what looking at the picture earns. Sections of at most 20 fields.

Refuses to know: other spellings (aliases.py), where a value was written (loader.py), which values
fit together (checks.py), paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_tune.config.field import arg

_RL = ("RLVR", "PPO", "UPO")
_RLVR = ("RLVR", "UPO")


@dataclass(frozen=True)
class SamplingArguments:
    """Where sampled answers end, and what of them is learned from. Stages RLVR and PPO, and UPO
    where its preset samples answers.
    """

    stop_strings: tuple[str, ...] = arg(
        (),
        "texts that end an answer, comma separated or a list; the token that completes one is kept and learned from",
        "使回答结束的文本，逗号分隔或列表；补全该文本的 token 保留并参与学习",
        stages=_RL,
    )
    tools: tuple[str, ...] = arg(
        (),
        "tools that answers may call, in the format of tool calls: zoom (shows a part of the row's first picture), "
        "file.py:function (its docstring is what the prompt says of it)",
        "回答可以调用的工具（按工具调用格式）：zoom（显示该行第一张图片的局部）、file.py:function（其文档字符串写入提示）",
        stages=("RLVR", "PPO"),
    )
    max_turns: int = arg(
        4, "turns of one answer with tools, at most", "使用工具时一个回答最多的轮数", low=1, stages=("RLVR", "PPO")
    )
    max_pictures: int = arg(
        8,
        "pictures that tools show one answer, at most",
        "工具最多为一个回答显示的图片数",
        low=0,
        stages=("RLVR", "PPO"),
    )
    max_tool_pixels: int = arg(
        0,
        "pixels of a picture that a tool shows, at most, beside image_max_pixels; 0: as that has it",
        "工具显示的图片最多的像素数（另受 image_max_pixels 限制）；0 表示只受后者限制",
        low=0,
        stages=("RLVR", "PPO"),
    )
    rollout_timeout_seconds: float = arg(
        0.0,
        "sampling time of a draw of prompts, after which answers under way are cut off as too long; 0: any. Runs then depend on the machine's speed",
        "一次抽取的采样时限（秒），到时未完成的回答按超长截断；0 表示不限。运行结果将取决于机器速度",
        low=0,
        stages=_RL,
    )
    min_p: float = arg(
        0.0,
        "least probability of a sampled token, over that of the likeliest; above 0 with keep_sampling_mask only",
        "采样 token 的最小概率（相对最可能者）；仅在 keep_sampling_mask 下可大于 0",
        low=0,
        high=1,
        stages=_RL,
    )
    keep_sampling_mask: bool = arg(
        False,
        "note what top_k (1 to 64), top_p and min_p left to draw from, and learn over that",
        "记录 top_k（1 至 64）、top_p 与 min_p 留下的可选 token，并在其上学习",
        stages=("RLVR", "PPO"),
    )
    over_sample: float = arg(
        1.0,
        "prompts that are answered, over those that a round lacks, with dynamic_sample: spares drawing again",
        "启用 dynamic_sample 时，所答提示数与一轮所缺数之比：减少再次抽取",
        low=1,
        stages=_RLVR,
    )
    reward_clip: tuple[float, ...] = arg(
        (),
        "bounds of an answer's weighted reward, before penalties for its length: low,high",
        "回答加权奖励的上下界（在长度惩罚之前）：低,高",
        stages=_RL,
    )
    top_entropy_quantile: float = arg(
        1.0,
        "share of a round's tokens, the most uncertain ones, that the policy's loss learns from; below 1 costs a forward",
        "策略损失只学习一轮中最不确定的这一部分 token；小于 1 时多一次前向",
        low=1e-6,
        high=1,
        stages=_RL,
    )


@dataclass(frozen=True)
class EvidenceArguments:
    """Rewards that only a policy which looks at the picture can earn. Stage RLVR."""

    evidence_twins: bool = arg(
        False,
        "answer each row's scene.twin in the same step: an answer is worth all only where the twin's are right too",
        "同一步中也回答每行的 scene.twin：孪生图片也答对时回答才得满分",
        stages=_RLVR,
    )
    evidence_twin_share: float = arg(
        0.5,
        "share of an answer's worth that does not depend on the twin",
        "回答得分中与孪生图片无关的部分",
        low=0,
        high=1,
        stages=_RLVR,
    )
    evidence_dependence: float = arg(
        0.0,
        "added to the reward of a right answer that is unlikely without the picture",
        "正确回答在看不到图片时概率很低，则最多加此奖励",
        low=0,
        stages=_RLVR,
    )
    evidence_boxes: float = arg(
        0.0,
        "added to the reward of a right answer whose cited box is small, needed and enough",
        "正确回答引用的框小、必要且充分，则最多加此奖励",
        low=0,
        stages=_RLVR,
    )
    evidence_scale: float = arg(
        2.0, "nats a token that are full marks", "得满分所需的每 token nat 数", low=1e-6, stages=_RLVR
    )
    perception_mask_ratio: float = arg(
        0.6,
        "share of the picture that is grey for a look without it",
        "遮住图片时变灰的比例",
        low=0.01,
        high=1,
        stages=_RLVR,
    )
    evidence_scope: str = arg(
        "both",
        "where free text is read for claims that the scene contradicts, which cost what the checker evidence says",
        "在何处读取自由文本中的陈述；与场景矛盾者按检查器 evidence 扣分",
        {
            "answer": ("in the answer", "回答中"),
            "thought": ("in the thought", "思考中"),
            "both": ("in both", "两者"),
        },
        stages=_RL,
    )
    process_rewards: str = arg(
        "off",
        "whether parts of an answer are credited apart from the whole",
        "是否对回答的各部分分别计奖",
        {
            "off": ("no", "否"),
            "claims": (
                "tokens of a claim that the row's scene contradicts lose advantage",
                "与该行场景矛盾的陈述，其 token 的优势降低",
            ),
        },
        stages=_RL,
    )
    process_weight: float = arg(
        0.1,
        "share of its own size that the advantage of such a token loses",
        "这些 token 的优势按自身大小降低的比例",
        low=0,
        stages=_RL,
        needs=("process_rewards", ("claims",)),
    )
    perception_coef: float = arg(
        0.0,
        "weight of the distance of right answers from the same ones with grey pictures (PAPO), which is to grow; at most 0.02 is usual",
        "正确回答与图片变灰时的距离（PAPO）的权重，使之增大；通常不超过 0.02",
        low=0,
        stages=("RLVR",),
    )
    perception_cap: float = arg(
        1.0, "bound of that distance, a token", "每 token 该距离的上限", low=1e-6, high=1e6, stages=("RLVR",)
    )
    perception_entropy: tuple[float, ...] = arg(
        (),
        "weights of the entropy with the picture and with the grey one, which are kept down beside it: seen,blind",
        "同时压低看图与看灰图时的熵，其权重：看图,灰图",
        stages=("RLVR",),
    )
    perception_every: int = arg(
        4, "rounds from one with that term to the next", "相邻两次使用该项的轮数之差", low=1, stages=("RLVR",)
    )


@dataclass(frozen=True)
class WatchArguments:
    """What a run that samples answers does not put up with. Stages that sample answers."""

    reward_limit_seconds: float = arg(
        600.0,
        "the most that one call of a reward function may take, 0: any time; then what reward_error says",
        "奖励函数单次调用的最长时间（秒），0 表示不限；超过后按 reward_error 处理",
        low=0,
        stages=_RL,
        shapes=False,
    )
    monitor_reward_funcs: tuple[str, ...] = arg(
        (),
        "judges that nothing is learned from, named as reward_funcs: an alarm where they no longer agree with the reward",
        "不参与学习的评判，写法同 reward_funcs：与奖励不再一致时报警",
        stages=_RL,
        shapes=False,
    )
    guard_action: str = arg(
        "say",
        "what an alarm does after which nothing is worth learning (constant or missing rewards, hacking, kl_budget)",
        "报警且继续学习已无意义时（奖励恒定或缺失、奖励投机、超出 kl_budget）如何处理",
        {"say": ("a line in the log", "在日志中提示"), "stop": ("the run ends, saved", "保存后结束运行")},
        stages=_RL,
    )
    kl_budget: float = arg(
        10.0,
        "nats an answer that the policy may be away from its reference before an alarm; 0: any",
        "策略与参考的距离（每个回答的 nat）超过此值时报警；0 表示不限",
        low=0,
        stages=_RL,
        shapes=False,
    )
    entropy_floor: float = arg(
        0.0,
        "nats a token below which the entropy gives an alarm; one also comes at a tenth of the first steps' mean",
        "熵（每 token nat）低于此值时报警；降到最初若干步均值的十分之一时也会报警",
        low=0,
        stages=_RL,
        shapes=False,
    )

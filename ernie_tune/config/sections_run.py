"""Settings of how a run goes: length, loss, optimizer, number format, measuring, saving, logging,
ranks. Frozen sections of at most 20 fields.

Refuses to know: other spellings (aliases.py), where a value was written (loader.py), which values
fit together (checks.py), paddle.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ernie_tune.config.field import arg
from ernie_tune.config.language import say

SHARDING = ("off", *(f"stage{n}{tail}" for n in (1, 2, 3) for tail in ("", " offload")))
WHEN = {
    "no": ("never", "从不"),
    "steps": ("every so many steps", "每隔若干步"),
    "epoch": ("after every pass over the data", "每遍数据之后"),
}
_WHOLE_LAYERS = say("recompute recomputes whole layers, each on its own", "recompute 逐层重算，每次一整层")
_SEQUENCES = say(
    "use tensor_model_parallel_size with sequence_parallel", "请用 tensor_model_parallel_size 与 sequence_parallel"
)


# What `eval_metrics` takes: the names of rewards/scores.py.
SCORES = {
    "exact_match": ("the same after normalising", "规范化后相同"),
    "token_f1": ("words (Chinese: characters) that are right", "词（中文为字）的 F1"),
    "squad_exact_match": ("SQuAD's exact match", "SQuAD 的精确匹配"),
    "squad_f1": ("SQuAD's F1 of words", "SQuAD 的词 F1"),
    "anls": ("DocVQA's likeness of letters", "DocVQA 的字符相似度"),
    "relaxed_accuracy": ("ChartQA's: numbers within 5 %", "ChartQA 的数值误差 5 % 以内"),
    "iou": ("overlap of boxes", "框的重叠度"),
    "accuracy": ("the right one of few answers, as classes", "作为类别时答对的比例"),
    "macro_f1": ("mean F1 of classes", "各类别 F1 的平均"),
}
# What `report_to` takes -> the package that it needs.
LOGGERS = {
    "visualdl": "visualdl",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "mlflow": "mlflow",
}


def has_logger(name: str) -> bool:
    """Whether the package of a name of `LOGGERS` is installed."""
    try:
        return importlib.util.find_spec(LOGGERS[name]) is not None
    except (ImportError, ValueError):  # a package that holds it is broken
        return False


@dataclass(frozen=True)
class TrainArguments:
    """How long, in what batches, on which loss."""

    num_train_epochs: float = arg(3.0, "passes over the data", "数据遍数", low=0)
    max_steps: int = arg(
        -1, "optimizer steps; -1: num_train_epochs decides", "优化步数；-1 表示由 num_train_epochs 决定", low=-1
    )
    per_device_train_batch_size: int = arg(
        1, "rows a device and micro-step; KTO: 2", "每设备每微步的行数；KTO 默认 2", low=1
    )
    gradient_accumulation_steps: int = arg(1, "micro-steps an optimizer step", "每个优化步的微步数", low=1)
    auto_find_batch_size: bool = arg(
        False,
        "deal the rows of a step into micro-batches as large as memory allows; the gradient is the same",
        "把一步的各行分成内存所允许的最大微批；梯度不变",
        stages=("SFT", "PT", "DPO", "RM"),
        shapes=False,
    )
    seed: int = arg(42, "seed of weights, order and dropout", "权重、顺序与 dropout 的种子", low=0, high=2**32 - 1)
    data_seed: int | None = arg(
        None, "seed of the order alone; null: seed", "仅数据顺序的种子；null 表示同 seed", low=0, high=2**32 - 1
    )
    loss_norm: str = arg(
        "token",
        "what the loss is averaged over",
        "损失按什么求平均",
        {
            "token": ("all answer tokens of the step", "该步所有回答 token"),
            "seq": ("rows, each the mean of its tokens", "行，每行先取 token 平均"),
            "token_balanced": ("tasks, each the mean of its tokens", "任务，每个任务先取 token 平均"),
        },
        stages=("SFT", "PT"),
    )
    thought_weight: float = arg(
        1.0, "loss weight of tokens inside the thought", "思考过程 token 的损失权重", low=0, stages=("SFT", "PT")
    )
    answer_weight: float = arg(
        1.0, "loss weight of tokens after the thought", "思考之后回答 token 的损失权重", low=0, stages=("SFT", "PT")
    )
    router_aux_loss_coef: float = arg(0.0, "weight of the load-balance loss", "负载均衡损失的权重", low=0)
    router_z_loss_coef: float = arg(0.0, "weight of the router z-loss", "路由 z-loss 的权重", low=0)
    moe_orthogonal_loss_lambda: float = arg(0.0, "weight of the router orthogonal loss", "路由正交损失的权重", low=0)
    moe_use_aux_free_update_coef: float = arg(
        0.0,
        "step of the routers' bias towards experts that got fewer tokens; 0: the bias stays",
        "路由偏置每步向较空闲专家移动的幅度；0 表示不变",
        low=0,
        methods=("Full", "Freeze"),
    )
    balance: str = arg(
        "static",
        "weights of the tasks",
        "各任务的权重",
        {
            "static": ("as many as their rows", "按行数"),
            "uncertainty": ("learned, by the noise of each task", "按各任务的噪声学习"),
            "dwa": ("by how fast each loss falls", "按各任务损失下降的快慢"),
        },
        stages=("SFT", "PT"),
    )


@dataclass(frozen=True)
class OptimArguments:
    """The optimizer and its schedule."""

    optim: str = arg("adamw", "optimizer", "优化器", ("adamw",))
    learning_rate: float = arg(
        3e-4, "peak learning rate; if not given, by stage and method", "最大学习率；未给出时由阶段与方法决定", low=0
    )
    min_lr: float = arg(0.0, "learning rate at the end of the schedule", "学习率最终值", low=0)
    lr_scheduler_type: str = arg(
        "cosine",
        "shape of the schedule",
        "学习率曲线",
        {
            "cosine": ("warm-up, then half a cosine down to min_lr", "预热后按半个余弦降到 min_lr"),
            "linear": ("warm-up, then a straight line down to min_lr", "预热后线性降到 min_lr"),
            "constant": ("the peak from the first step; warm-up is ignored", "始终为最大值；不预热"),
            "constant_with_warmup": ("warm-up, then the peak", "预热后保持最大值"),
        },
    )
    warmup_steps: int = arg(
        0,
        "steps of linear warm-up; the first has peak / warmup_steps, not 0",
        "线性预热步数；第一步为 最大值/warmup_steps，而不是 0",
        low=0,
    )
    warmup_ratio: float = arg(
        0.0, "warm-up as a share of all steps, rounded up", "预热占总步数的比例，向上取整", low=0, high=1
    )
    weight_decay: float = arg(0.1, "decoupled weight decay", "解耦权重衰减", low=0)
    adam_beta1: float = arg(0.9, "decay of the first moment", "一阶动量的衰减", low=0, high=0.999999)
    adam_beta2: float = arg(0.95, "decay of the second moment", "二阶动量的衰减", low=0, high=0.999999)
    adam_epsilon: float = arg(1e-8, "added to the denominator", "分母上加的小数", low=0)
    max_grad_norm: float = arg(
        1.0, "gradients are clipped to this norm; 0: never", "梯度裁剪到此范数；0 表示不裁剪", low=0
    )
    moe_gate_lr_ratio: float = arg(0.01, "router learning rate over learning_rate", "路由学习率的比例", low=0)
    vit_lr_ratio: float = arg(0.9, "vision learning rate over learning_rate", "视觉塔学习率的比例", low=0)


@dataclass(frozen=True)
class ComputeArguments:
    """Number format and what is traded for memory."""

    bf16: bool = arg(
        False, "compute in bfloat16; on a CPU float32 stands in", "用 bfloat16 计算；CPU 上以 float32 代替"
    )
    fp16: bool = arg(
        False,
        "compute in float16",
        "用 float16 计算",
        unbuilt=say(
            "set bf16: true, which needs no loss scaling; the released weights are bfloat16",
            "请设 bf16: true，无需缩放损失；发布的权重即为 bfloat16",
        ),
    )
    float64: bool = arg(
        False,
        "compute in float64: tells rounding from mistakes; slow",
        "用 float64 计算：用于区分舍入与错误；慢",
    )
    fp16_opt_level: str = arg(
        "O2",
        "what float16 casts",
        "float16 转换的范围",
        {"O1": ("products only", "仅乘法"), "O2": ("parameters too", "也包括参数")},
        shapes=False,
        unread=say("nothing is cast to float16", "没有转换为 float16 的计算"),
    )
    weight_quantize_algo: str = arg(
        "none",
        "format of the frozen base weights",
        "冻结的基座权重的格式",
        {
            "none": ("as they are", "不量化"),
            "weight_only_int8": ("8 bits, a scale a channel", "8 位，每通道一个缩放"),
            "weight_only_mix": ("experts 4 bits, the rest 8", "专家 4 位，其余 8 位"),
            "nf4": ("4 bits, NormalFloat (QLoRA)", "4 位 NormalFloat（QLoRA）"),
            "fp8_linear": ("8-bit floats", "8 位浮点"),
        },
    )
    recompute: bool = arg(
        False,
        "recompute activations in the backward pass",
        "反向时重算激活（省显存）",
        shapes=False,
    )
    recompute_granularity: str = arg(
        "full",
        "what is recomputed",
        "重算的范围",
        {
            "full": ("whole layers", "整层"),
            "full_attn": ("attention", "注意力"),
            "core_attn": ("scores of attention", "注意力分数"),
        },
        shapes=False,
        unread=_WHOLE_LAYERS,
    )
    recompute_method: str = arg(
        "uniform",
        "which layers are recomputed",
        "重算哪些层",
        {"uniform": ("all, in units", "全部，按单元"), "block": ("the first ones", "前若干层")},
        shapes=False,
        unread=_WHOLE_LAYERS,
    )
    recompute_num_layers: int = arg(
        1,
        "layers a unit (uniform) or layers in all (block)",
        "每单元层数（uniform）或总层数（block）",
        low=1,
        shapes=False,
        unread=_WHOLE_LAYERS,
    )
    recompute_modules: tuple[str, ...] = arg(
        (), "only these modules; empty: whole layers", "只重算这些模块；空表示整层", shapes=False, unread=_WHOLE_LAYERS
    )


@dataclass(frozen=True)
class EvalArguments:
    """When and on what the model is measured."""

    do_eval: bool = arg(False, "evaluate once at the end", "结束时评估一次", shapes=False)
    eval_strategy: str = arg("no", "when to evaluate", "何时评估", WHEN, shapes=False)
    eval_steps: int = arg(0, "steps between evaluations", "两次评估间的步数", low=0, shapes=False)
    per_device_eval_batch_size: int = arg(1, "rows a device", "评估时每设备的行数", low=1, shapes=False)
    load_best_model_at_end: bool = arg(False, "finish with the best checkpoint", "结束时取最佳检查点")
    metric_for_best_model: str = arg("loss", "metric that names the best checkpoint", "用哪个指标选最佳检查点")
    greater_is_better: bool | None = arg(
        None, "direction of the metric; null: loss down, others up", "指标方向；null：损失越低越好，其余越高越好"
    )
    early_stopping_patience: int = arg(
        0, "evaluations without progress before stopping; 0: never stop", "多少次评估无进步即停止；0 表示不停", low=0
    )
    eval_max_samples: int = arg(
        64,
        "held-out rows answered at an evaluation while training; 0: only the loss",
        "训练中评估时作答的留出行数；0 表示只算损失",
        low=0,
        shapes=False,
    )
    report_max_samples: int = arg(
        300,
        "held-out rows answered before and after training",
        "训练前后作答的留出行数",
        low=0,
        shapes=False,
    )
    eval_max_new_tokens: int = arg(
        64,
        "tokens of an answer, at most; where answers are sampled to learn from, no fewer than max_completion_length",
        "每个回答最多的 token 数；采样学习的阶段不少于 max_completion_length",
        low=1,
        shapes=False,
    )
    num_generations_eval: int = arg(
        1,
        "answers sampled to each held-out prompt: above 1 eval_pass@k and their mean reward are measured beside the "
        "likeliest answer's",
        "每个留出提示采样的回答数：大于 1 时除最可能的回答外，还统计 eval_pass@k 与平均奖励",
        low=1,
        stages=("RLVR", "PPO", "UPO"),
        shapes=False,
    )
    eval_metrics: tuple[str, ...] = arg(
        (),
        "scores of the answers; empty: those that fit the references",
        "回答的评分指标；空表示由参考答案决定",
        SCORES,
        shapes=False,
    )
    guard_dataset_path: tuple[str, ...] = arg(
        (), "general rows watched for forgetting", "用于监控遗忘的通用数据", shapes=False
    )
    guard_tolerance: float = arg(
        0.02,
        "alarm when the guard score falls by more than this",
        "监控分数下降超过此值时报警",
        low=0,
        shapes=False,
    )
    guard_stop: bool = arg(False, "stop at the alarm", "报警时停止")


@dataclass(frozen=True)
class SaveArguments:
    """What is written where."""

    output_dir: str = arg("./output", "folder of everything that the run writes", "运行所写一切的文件夹", shapes=False)
    save_strategy: str = arg("steps", "when to save", "何时保存", WHEN, shapes=False)
    save_steps: int = arg(500, "steps between checkpoints", "两次保存间的步数", low=0, shapes=False)
    save_total_limit: int | None = arg(
        None, "checkpoints kept; null: all", "保留的检查点个数；null 表示全部", low=1, shapes=False
    )
    save_only_model: bool = arg(False, "leave out what only resuming needs", "不保存仅续训需要的内容", shapes=False)
    async_save: bool = arg(
        False,
        "write what resuming needs while training goes on; takes memory for a copy of it",
        "训练的同时写入续训所需内容；需要一份副本的内存",
        shapes=False,
    )
    resume_from_checkpoint: str = arg(
        "auto",
        "auto: newest in output_dir; no; or a folder",
        "auto：output_dir 中最新的；no：不续训；或一个文件夹",
        shapes=False,
    )
    overwrite_output_dir: bool = arg(
        False,
        "start anew: what earlier runs left in output_dir is moved to output_dir/earlier-N",
        "重新开始：output_dir 中先前运行的内容移至 output_dir/earlier-N",
        shapes=False,
    )
    push_to_hub: str = arg(
        "",
        "repository (owner/model) that gets the result when training has ended, private if it is new; empty: nothing leaves this machine",
        "训练结束后接收结果的仓库（owner/model），新建时为私有；留空则不上传任何内容",
        shapes=False,
    )
    push_hub: str = arg(
        "huggingface",
        "the hub of push_to_hub",
        "push_to_hub 所用的模型库",
        ("huggingface", "modelscope", "aistudio"),
        shapes=False,
    )
    resume_only_model: bool = arg(
        False,
        "take the weights, start optimizer and data anew",
        "只取权重，优化器与数据从头开始",
        shapes=False,
    )
    ignore_data_skip: bool = arg(
        False,
        "on resuming, start the data from the first row",
        "续训时数据从第一行开始",
        shapes=False,
    )


@dataclass(frozen=True)
class LogArguments:
    """What is told while training. trainer_log.jsonl and metrics.csv are always written."""

    logging_steps: int = arg(1, "steps between log lines", "两行日志间的步数", low=1, shapes=False)
    logging_dir: str = arg(
        "",
        "folder of the report_to writers; empty: output_dir/runs",
        "report_to 写入的文件夹；空表示 output_dir/runs",
        shapes=False,
    )
    report_to: tuple[str, ...] = arg(
        (),
        "further loggers, each through its own package; all: those that are installed. visualdl, tensorboard and mlflow write below logging_dir (mlflow to MLFLOW_TRACKING_URI where that is set); wandb and swanlab send to their services unless WANDB_MODE or SWANLAB_MODE is offline",
        "另外的记录工具，各用其自己的软件包；all 表示已安装的全部。visualdl、tensorboard、mlflow 写入 logging_dir（设置了 MLFLOW_TRACKING_URI 时 mlflow 写到那里）；wandb 与 swanlab 会发送到其服务，除非 WANDB_MODE 或 SWANLAB_MODE 为 offline",
        (*LOGGERS, "all"),
        shapes=False,
    )
    disable_tqdm: bool = arg(False, "plain lines instead of a progress bar", "以文本行代替进度条", shapes=False)
    plot_loss: bool = arg(True, "draw training_loss.png", "绘制 training_loss.png", shapes=False)


@dataclass(frozen=True)
class ParallelArguments:
    """Degrees of the Fleet mesh: none of them changes a loss by more than rounding."""

    tensor_model_parallel_size: int = arg(1, "tensor parallel degree", "张量并行度", low=1, shapes=False)
    pipeline_model_parallel_size: int = arg(1, "pipeline parallel degree", "流水线并行度", low=1, shapes=False)
    virtual_pipeline_model_parallel_size: int = arg(
        1, "pipeline chunks a rank", "每个 rank 的流水线段数", low=1, shapes=False
    )
    pp_seg_method: tuple[str, ...] = arg(
        (),
        "where the pipeline is cut: uniform, layer:DecoderLayer, first items ([0, 13, 31]) or numbers of layers ([12, 16]); empty: by cost",
        "流水线在何处切分：uniform、layer:DecoderLayer、各段首项或各段层数；空表示按代价",
        shapes=False,
    )
    sharding_parallel_size: int = arg(
        1, "ranks that share optimizer state", "分摊优化器状态的 rank 数", low=1, shapes=False
    )
    sharding: str = arg("off", "what is sharded", "分摊什么", SHARDING, shapes=False)
    sequence_parallel: bool = arg(
        False,
        "split activations over the tensor parallel ranks",
        "把激活切分到各张量并行 rank",
        shapes=False,
    )
    context_parallel_size: int = arg(
        1, "context parallel degree", "上下文并行度", low=1, shapes=False, unbuilt=_SEQUENCES
    )
    sep_parallel_size: int = arg(1, "segment parallel degree", "序列段并行度", low=1, shapes=False, unbuilt=_SEQUENCES)
    expert_model_parallel_size: int = arg(1, "expert parallel degree", "专家并行度", low=1, shapes=False)
    expert_tensor_model_parallel_size: int = arg(
        1,
        "tensor parallel degree inside an expert",
        "专家内部的张量并行度",
        low=1,
        shapes=False,
        unbuilt=say("use expert_model_parallel_size", "请用 expert_model_parallel_size"),
    )

"""Settings of what is trained on what: rows, pictures, the model, its adapters and what stays
frozen. Frozen sections of at most 20 fields.

Refuses to know: other spellings (aliases.py), where a value was written (loader.py), which values
fit together (checks.py), paddle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie_tune.config.field import arg
from ernie_tune.config.language import say
from ernie_tune.config.stages import STAGES

# methods that put new layers or tokens beside the frozen model
ADDED = ("Adapter", "Prompt", "PTuning", "Prefix")
METHODS = {
    "LoRA": ("low-rank adapters beside the frozen weights", "在冻结权重旁训练低秩适配器"),
    "Full": ("all weights, but for freeze_config", "训练全部权重（freeze_config 除外）"),
    "Freeze": ("the weights of chosen layers", "只训练选定层的权重"),
    "Adapter": ("bottleneck layers after attention and feed-forward", "在注意力与前馈层后加入瓶颈层"),
    "Prompt": ("virtual tokens before every row", "在每行前加入可学习的虚拟 token"),
    "PTuning": ("virtual tokens that a small MLP makes", "由小型 MLP 生成的虚拟 token"),
    "Prefix": ("virtual keys and values in every layer", "在每层加入虚拟的键与值"),
}
FREEZE_WORDS = tuple(
    f"freeze_{part}" for part in ("vision", "aligner", "llm", "router", "text_experts", "vision_experts")
)
# Names of row formats, families of them among them; `data/readers/formats.py` reads them.
ROW_FORMATS = (
    *("auto", "canonical", "erniekit", "erniekit_vl", "erniekit_dpo", "alpaca", "sharegpt", "pairs", "ranked"),
    *("scored", "labels", "verifiable", "messages", "vqa", "task", "prompt_response", "classification", "prompt"),
    *("pictures", "text"),
)
TEMPLATES = ("auto", "hf", "ernie_vl", "ernie_vl_nothink")
_ADAPTED = ("LoRA",)


@dataclass(frozen=True)
class DataArguments:
    """Which rows, in which proportion, cut to which length."""

    train_dataset_path: tuple[str, ...] = arg(
        (),
        "training files, comma separated; path#500 takes 500 rows",
        "训练文件，逗号分隔；path#500 表示取 500 行",
    )
    train_dataset_type: tuple[str, ...] = arg(
        ("auto",), "row format, one for all files or one a file", "数据格式：全部文件一个，或每个文件一个", ROW_FORMATS
    )
    train_dataset_prob: tuple[float, ...] = arg((), "mixing weights, one a file", "混合权重，每个文件一个", low=0)
    eval_dataset_path: tuple[str, ...] = arg(
        (), "evaluation files, comma separated", "评估文件，逗号分隔", shapes=False
    )
    eval_dataset_type: tuple[str, ...] = arg(
        ("auto",), "row format of the evaluation files", "评估文件的数据格式", ROW_FORMATS, shapes=False
    )
    val_size: float = arg(
        0.0,
        "rows held out of the training files: below 1 a share, else a count",
        "从训练文件留出的评估行：小于 1 为比例，否则为行数",
        low=0,
    )
    max_samples: int | None = arg(
        None,
        "rows taken of each training and evaluation file, the first ones; null: all",
        "每个训练与评估文件最多取前多少行；null 表示全部",
        low=1,
    )
    dataset_dir: str = arg(
        "", "folder of dataset_info.json; empty: this folder", "dataset_info.json 所在文件夹；空表示当前文件夹"
    )
    mix_strategy: str = arg(
        "concat",
        "how files are mixed",
        "多个文件如何混合",
        {
            "concat": ("one after the other, then shuffled together", "首尾相接后一起打乱"),
            "random": ("each row from a file drawn by train_dataset_prob", "按 train_dataset_prob 抽取文件"),
            "interleave_under": ("by turns until the first file ends", "轮流取行，直到最先用完的文件"),
            "interleave_over": ("by turns until the last file ends", "轮流取行，直到最后用完的文件"),
        },
    )
    max_seq_len: int = arg(8192, "tokens in a row or pack, at most", "每行（或每个打包序列）最多的 token 数", low=2)
    truncation_strategy: str = arg(
        "delete",
        "what is done with rows that are too long; media are never cut",
        "过长的行如何处理；图片与视频不会被截断",
        {
            "delete": ("left out, and counted", "丢弃并计数"),
            "left": ("the beginning is cut", "截去开头"),
            "right": ("the end is cut", "截去结尾"),
            "error": ("the run stops", "停止运行"),
        },
    )
    packing: bool = arg(False, "put several rows in one sequence", "把多行打包进一个序列")
    greedy_intokens: bool = arg(
        False,
        "pack best-fit over a window of rows instead of in reading order",
        "在一个窗口内按最佳匹配打包，而非按读取顺序",
    )
    template: str = arg(
        "auto",
        "chat template: hf, ernie_vl or ernie_vl_nothink; auto: the model's own",
        "对话模板：hf、ernie_vl 或 ernie_vl_nothink；auto 表示模型自带",
    )
    template_backend: str = arg(
        "custom",
        "renderer of the chat template",
        "对话模板的渲染方式",
        {"custom": ("our own, byte for byte the model's", "内置，与模型模板逐字节一致"), "jinja": ("Jinja", "Jinja")},
        unbuilt=say(
            "leave it out: custom renders the bytes of the model's own Jinja template",
            "请去掉：custom 所写与模型自带的 Jinja 模板逐字节相同",
        ),
    )
    dataloader_num_workers: int = arg(
        0,
        "processes that prepare rows; 0: none",
        "准备数据的进程数；0 表示不用",
        low=0,
        shapes=False,
        unread=say("the training process prepares its rows itself", "训练进程自行准备数据"),
    )


@dataclass(frozen=True)
class MediaArguments:
    """Size of pictures and videos. null: what the model folder says."""

    image_min_pixels: int | None = arg(None, "smaller images are enlarged", "小于此像素数的图片会被放大", low=1)
    image_max_pixels: int | None = arg(
        None, "larger images are shrunk: the main memory knob", "大于此像素数的图片会被缩小：最主要的显存开关", low=1
    )
    video_max_pixels: int | None = arg(None, "larger frames are shrunk", "大于此像素数的视频帧会被缩小", low=1)
    video_fps: float | None = arg(None, "frames taken a second", "每秒取多少帧", low=0)
    video_max_frames: int | None = arg(None, "frames taken of one video, at most", "每个视频最多取多少帧", low=1)


@dataclass(frozen=True)
class ModelArguments:
    """Which weights, and what is done to them."""

    model_name_or_path: str = arg(
        "", "folder, hub name, or preset (fresh weights)", "模型文件夹、模型库名称或预设名（全新权重）"
    )
    download_hub: str = arg(
        "none",
        "hub that a model which is not on this machine is fetched from",
        "本机没有模型时从哪个模型库下载",
        {
            "none": ("nothing is downloaded unasked", "不下载"),
            "huggingface": ("huggingface.co, or HF_ENDPOINT", "huggingface.co，或 HF_ENDPOINT"),
            "modelscope": ("modelscope.cn", "modelscope.cn"),
            "aistudio": ("aistudio.baidu.com", "aistudio.baidu.com"),
        },
        shapes=False,
    )
    stage: str = arg(
        "SFT", "training stage", "训练阶段", {name: (stage.help, stage.help_zh) for name, stage in STAGES.items()}
    )
    fine_tuning: str = arg("LoRA", "what is trained", "训练哪些参数", METHODS)


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters (LoRA, 2106.09685, and its relatives)."""

    lora_rank: int = arg(8, "inner width of the adapters", "适配器的内部宽度（秩）", low=1, methods=_ADAPTED)
    lora_alpha: int = arg(
        -1,
        "numerator of the scale; -1: twice the rank, or 4 with rslora",
        "缩放的分子；-1 表示两倍的秩，rslora 时为 4",
        low=-1,
        methods=_ADAPTED,
    )
    lora_dropout: float = arg(
        0.0, "dropout before the adapters", "适配器前的 dropout", low=0, high=0.99, methods=_ADAPTED
    )
    lora_target_modules: tuple[str, ...] = arg(
        (),
        "layers that get adapters; empty: attention and dense feed-forward; all: every linear layer",
        "加适配器的层；空表示注意力与稠密前馈层；all 表示所有线性层",
        methods=_ADAPTED,
    )
    adapter_format: str = arg(
        "auto",
        "files of the adapter: paddlenlp's, or peft's with their names; auto: paddlenlp's where it can hold it",
        "适配器的文件格式：paddlenlp，或 peft 的格式与文件名；auto 表示能用 paddlenlp 则用它",
        ("auto", "paddlenlp", "peft"),
        methods=_ADAPTED,
        shapes=False,
    )
    lora_path: str = arg("", "adapter folder to continue from", "从哪个适配器文件夹继续训练", methods=_ADAPTED)
    rslora: bool = arg(
        False, "scale by alpha/sqrt(rank) instead of alpha/rank", "按 alpha/sqrt(rank) 缩放", methods=_ADAPTED
    )
    lora_plus_scale: float = arg(
        1.0, "learning rate of B over that of A (LoRA+)", "B 与 A 的学习率之比（LoRA+）", low=0, methods=_ADAPTED
    )
    dora: bool = arg(
        False, "train the magnitude of each column too (DoRA)", "同时训练各列的模长（DoRA）", methods=_ADAPTED
    )
    pissa: bool = arg(
        False,
        "start from the principal singular vectors (PiSSA)",
        "从主奇异向量开始（PiSSA）",
        methods=_ADAPTED,
        unbuilt=say("leave it out: adapters start from random A and zero B", "请去掉：适配器的 A 随机、B 为零开始"),
    )
    lora_experts: str = arg(
        "none",
        "experts that get adapters",
        "哪些专家加适配器",
        {
            "none": ("no expert", "都不加"),
            "text": ("those of text tokens", "文本专家"),
            "vision": ("those of picture tokens", "视觉专家"),
            "both": ("all routed experts", "全部路由专家"),
            "shared": ("the shared experts", "共享专家"),
        },
        methods=_ADAPTED,
    )
    lora_expert_list: tuple[str, ...] = arg(
        (),
        "only these experts, as layer:text|vision:first-last, e.g. 3:vision:0-7",
        "只给这些专家：层:text|vision:首-尾，如 3:vision:0-7",
        methods=_ADAPTED,
    )
    lora_expert_affinity: float = arg(
        0.0,
        "only the fewest experts that take this share of the tokens; 0: all",
        "只给承担此比例 token 的最少专家；0 表示全部",
        low=0,
        high=1,
        methods=_ADAPTED,
    )

    @property
    def effective_alpha(self) -> int:
        """`lora_alpha`, or what -1 stands for: 4 with rsLoRA, else 2·rank, as in PaddleFormers."""
        if self.lora_alpha != -1:
            return self.lora_alpha
        return 4 if self.rslora else 2 * self.lora_rank

    @property
    def scaling(self) -> float:
        """What multiplies B·A: alpha/rank (2106.09685), or alpha/sqrt(rank) with rsLoRA
        (2312.03732).
        """
        return self.effective_alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)


@dataclass(frozen=True)
class AddedArguments:
    """Bottleneck adapters, prompts and prefixes."""

    num_virtual_tokens: int = arg(
        20,
        "learned tokens before every row (Prompt, PTuning, Prefix)",
        "每行前可学习的虚拟 token 数",
        low=1,
        methods=("Prompt", "PTuning", "Prefix"),
    )
    prompt_encoder_width: int = arg(
        128,
        "inner width of the MLP that makes the prompt (PTuning)",
        "生成提示的 MLP 的内部宽度",
        low=1,
        methods=("PTuning",),
    )
    adapter_width: int = arg(
        64, "inner width of the adapters (Adapter)", "瓶颈适配器的内部宽度", low=1, methods=("Adapter",)
    )


@dataclass(frozen=True)
class FreezeArguments:
    """What stays as it is."""

    freeze_config: tuple[str, ...] = arg(
        (), "parts that stay frozen, separated by spaces", "保持冻结的部分，空格分隔", FREEZE_WORDS
    )
    trainable_layers: tuple[str, ...] = arg(
        (), "layer numbers or names: only these are trained", "层号或名称：只训练这些层"
    )
    frozen_layers: tuple[str, ...] = arg((), "layer numbers or names that stay frozen", "保持冻结的层号或名称")
    freeze_spec: str = arg(
        "",
        "JSON file with trainable_layers and frozen_layers",
        "含 trainable_layers 与 frozen_layers 的 JSON 文件",
    )

"""Does a run fit the memory that is free on this machine, before anything is loaded?

Refuses to know: what is free, paddle, numpy, cards (`ernie-tune estimate` counts their memory).
"""

from __future__ import annotations

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.host_memory import Free
from ernie_tune.config.language import Text, join, say
from ernie_tune.config.layout import Layout
from ernie_tune.models.config import ModelConfig
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.packed_header import room_problem
from ernie_tune.plan.cards import card
from ernie_tune.plan.job import Job, job_of
from ernie_tune.plan.memory import memory
from ernie_tune.plan.search import changes_that_fit

GB = 1e9
_WEIGHTS = ("weights", "quantised base", "vision tower")
# What a run holds from its first step on, however short its rows are.
_ALWAYS = (
    *_WEIGHTS,
    *("adapters", "reference model", "critic", "reward model", "gradients", "optimizer"),
)


def check_weights(model: ModelConfig, algorithm: str, free: Free | None) -> None:
    """ValueError for weights that one CPU process cannot hold to answer with: float32, or quantised
    by `algorithm` ("none" for a folder as it is). Codes of a packed folder need no check.
    """
    job = Job(model, method="LoRA", lora=LoraConfig(), quantize=algorithm, element_bytes=4, row_tokens=1)
    items = memory(job, Layout(), card("cpu")).items
    held = sum(items.get(name, 0.0) for name in _WEIGHTS)
    if free is not None and held > free.bytes:
        raise ValueError(
            say(
                f"memory ({free.bytes / GB:.1f} GB free, by {free.bound}) must hold {held / GB:.1f} GB of weights; export them once "
                "with --quantization wint4 --emit packed and name that folder, whose codes stay in their files",
                f"内存（剩余 {free.bytes / GB:.1f} GB，受限于{free.bound}）须容纳 {held / GB:.1f} GB 的权重；请先用 "
                "--quantization wint4 --emit packed 导出一次，再使用该文件夹，其编码留在文件中",
            )
        )


def shortage(
    config: RunConfig, model: ModelConfig, free: Free, addresses: Free | None = None
) -> tuple[Text | None, bool]:
    """What to say of a run of one process on a CPU that may not fit, and whether it is certain: its
    weights and states alone are too much. (None, False) for one that fits. `addresses`: what
    `ulimit -v` leaves, against which a packed folder's files count too.
    """
    job = job_of(config, model, on_cpu=True)
    items = memory(job, Layout(), card("cpu")).items
    # codes of a packed folder are pages of a file, which the system takes back
    mapped = items.get("quantised base", 0.0) if job.packed is not None else 0.0
    held = sum(v for k, v in items.items() if k in _ALWAYS) - mapped
    files = float(job.packed.file_bytes) if job.packed is not None else 0.0
    if job.packed is not None and (problem := room_problem(held, files, None, addresses)):
        return problem, True
    needed = sum(items.values())
    if needed <= free.bytes:
        return None, False
    certain = held > free.bytes
    machine = card(f"cpu-{max(1, int(free.bytes / GB))}g")
    fits = [join(" + ", list(texts)) for texts in changes_that_fit(job, machine, 1, count=2)]
    english, chinese = " or ".join(fit.english for fit in fits), " 或 ".join(fit.chinese for fit in fits)
    remedy = say(f"; it would fit with {english}", f"；改用 {chinese} 则放得下") if fits else say("", "")
    if certain:
        return (
            say(
                f"memory ({free.bytes / GB:.1f} GB free, by {free.bound}) must hold at least {held / GB:.1f} GB of weights, "
                f"gradients and optimizer states{remedy.english}",
                f"内存（剩余 {free.bytes / GB:.1f} GB，受限于{free.bound}）至少须容纳 {held / GB:.1f} GB 的权重、梯度与优化器状态{remedy.chinese}",
            ),
            True,
        )
    return (
        say(
            f"memory: rows as long as allowed need {needed / GB:.1f} GB, {free.bytes / GB:.1f} GB are free, by {free.bound}; "
            f"the system may end the run{remedy.english}",
            f"内存：若各行都达到允许的长度，需要 {needed / GB:.1f} GB，剩余 {free.bytes / GB:.1f} GB（受限于{free.bound}）；"
            f"系统可能会终止训练{remedy.chinese}",
        ),
        False,
    )

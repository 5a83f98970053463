"""Which degrees of parallelism a model can be cut into, said before anything is
loaded, with the nearest ones that work.

Refuses to know: bytes and seconds (memory.py, time.py), process groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ernie_tune.config.language import say
from ernie_tune.config.layout import EXPERT, PIPE, SEGMENTS, SHARDING, TENSOR, VIRTUAL, Layout
from ernie_tune.config.sections_run import ParallelArguments
from ernie_tune.models.config import ModelConfig
from ernie_tune.plan.segments import bounds_of

Problem = tuple[str, str]  # (the setting to point at, message)


def problems(
    model: ModelConfig,
    layout: Layout,
    *,
    world: int | None = None,
    accumulation: int | None = None,
) -> list[Problem]:
    """Why `model` cannot be cut like this; empty if it can. `world`: processes, `accumulation`:
    micro-batches a step, where known.
    """
    rules = (
        *_tensor(model, layout),
        *_experts(model, layout),
        *_pipeline(model, layout, accumulation),
        *_sharding(layout),
        *_world(layout, world),
    )
    return list(rules)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _tensor(model: ModelConfig, layout: Layout) -> Iterator[Problem]:
    t = layout.tensor
    if t == 1:
        return
    legal = [d for d in _divisors(model.num_key_value_heads) if not list(_uneven(model, d))]
    for name, value in _uneven(model, t):
        yield (
            TENSOR,
            say(
                f"{TENSOR} ({t}) must divide {name} ({value}); for this model choose one of {legal}",
                f"{TENSOR}（{t}）须整除 {name}（{value}）；该模型可选 {legal}",
            ),
        )


def _uneven(model: ModelConfig, tensor: int) -> Iterator[tuple[str, int]]:
    """Sizes that `tensor` does not divide."""
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }
    if model.moe is not None and model.moe.num_shared_experts:
        sizes["width of the shared expert"] = model.moe.shared_intermediate_size
    for name, value in sizes.items():
        if value % tensor:
            yield name, value


def _experts(model: ModelConfig, layout: Layout) -> Iterator[Problem]:
    e, t, s = layout.expert, layout.tensor, layout.replicas
    if e <= 1:
        return
    if model.moe is None:
        yield (
            EXPERT,
            say(
                f"{EXPERT} ({e}) must be 1 for a model without experts; remove it",
                f"模型没有专家时 {EXPERT}（{e}）须为 1；请去掉",
            ),
        )
        return
    if model.moe.num_experts % e:
        legal = _divisors(model.moe.num_experts)
        yield (
            EXPERT,
            say(
                f"{EXPERT} ({e}) must divide the experts of one modality ({model.moe.num_experts}); "
                f"choose one of {legal}",
                f"{EXPERT}（{e}）须整除单一模态的专家数（{model.moe.num_experts}）；可选 {legal}",
            ),
        )
    if e % t or (t * s) % e:
        legal = [d for d in _divisors(t * s) if d % t == 0 and model.moe.num_experts % d == 0]
        yield (
            EXPERT,
            say(
                f"{EXPERT} ({e}) must be a multiple of {TENSOR} ({t}) and divide {TENSOR} * replicas ("
                f"{t * s}), so that expert * moe_sharding = tensor * sharding; choose one of "
                f"{legal or [t]}",
                f"{EXPERT}（{e}）须为 {TENSOR}（{t}）的倍数并整除 {TENSOR} × 副本数（{t * s}），使 "
                f"expert × moe_sharding = tensor × sharding；可选 {legal or [t]}",
            ),
        )


def _pipeline(model: ModelConfig, layout: Layout, accumulation: int | None) -> Iterator[Problem]:
    p, v = layout.pipe, layout.virtual_pipe
    # embedding, layers, norm, head
    items = model.num_hidden_layers + 2 + int(not model.tie_word_embeddings)
    if p * v > items:
        yield (
            PIPE,
            say(
                f"{PIPE} ({p}) * {VIRTUAL} ({v}) must not exceed the parts that the model can be "
                f"cut into ({items}: embedding, {model.num_hidden_layers} layers, norm, head); choose at "
                f"most {items // v}",
                f"{PIPE}（{p}）× {VIRTUAL}（{v}）不能超过模型可切分的段数（{items}：embedding、"
                f"{model.num_hidden_layers} 层、norm、head）；最多取 {items // v}",
            ),
        )
    if p > 1 and layout.segments:
        yield from _segments(model, layout)
    if v > 1 and p <= 2:
        yield (
            VIRTUAL,
            say(
                f"{VIRTUAL} ({v}) needs {PIPE} ({p}) above 2; raise that to 4, or set {VIRTUAL}: 1",
                f"{VIRTUAL}（{v}）需要 {PIPE}（{p}）大于 2；请将后者调到 4，或设 {VIRTUAL}: 1",
            ),
        )
    if v > 1 and accumulation is not None and accumulation != p and accumulation < 2 * p:
        yield (
            "gradient_accumulation_steps",
            say(
                f"gradient_accumulation_steps ({accumulation}) must be {PIPE} ({p}) or at least "
                f"twice that with {VIRTUAL} ({v}); set {(p if accumulation < p else 2 * p)}",
                f"在 {VIRTUAL}（{v}）下 gradient_accumulation_steps（{accumulation}）须等于 {PIPE}（"
                f"{p}）或至少为其两倍；请设为 {(p if accumulation < p else 2 * p)}",
            ),
        )


def _segments(model: ModelConfig, layout: Layout) -> Iterator[Problem]:
    try:
        bounds = bounds_of(layout.segments, model.num_hidden_layers, layout.pipe * layout.virtual_pipe)
    except ValueError as error:
        yield SEGMENTS, str(error)
        return
    if layout.sequence_parallel and bounds[-2] == bounds[-1] - 1:
        yield (
            SEGMENTS,
            say(
                f"{SEGMENTS} ({','.join(layout.segments)}) must leave norm and head on one stage with "
                f"sequence_parallel; begin the last part at {bounds[-1] - 2} or before",
                f"启用 sequence_parallel 时 {SEGMENTS}（{','.join(layout.segments)}）须使 norm 与 head "
                f"在同一段；最后一段请从 {bounds[-1] - 2} 或之前开始",
            ),
        )


def _sharding(layout: Layout) -> Iterator[Problem]:
    if layout.sharding_stage > 1 and layout.pipe > 1:
        yield (
            "sharding",
            say(
                f"sharding (stage{layout.sharding_stage}) must be stage1 with {PIPE} ({layout.pipe}); change one",
                f"{PIPE}（{layout.pipe}）下 sharding（stage{layout.sharding_stage}）须为 stage1；请修改其一",
            ),
        )
    if layout.sharding_stage and layout.sharding == 1 and layout.data > 1:
        yield (
            SHARDING,
            say(
                f"{SHARDING} (1) must be above 1 with sharding (stage{layout.sharding_stage}): {layout.data} "
                f"ranks have the same weights and share nothing; set it to {layout.data}, or sharding: off",
                f"sharding（stage{layout.sharding_stage}）下 {SHARDING}（1）须大于 1：{layout.data} "
                f"个进程权重相同却没有分摊；请设为 {layout.data}，或 sharding: off",
            ),
        )
    if layout.offload and layout.data > 1:
        yield (
            "sharding",
            say(
                f"sharding (stage{layout.sharding_stage} offload) must not go with {layout.data} data replicas; "
                f"set {SHARDING} to {layout.sharding * layout.data}",
                f"sharding（stage{layout.sharding_stage} offload）不能与 {layout.data} 个数据副本同用；请将 "
                f"{SHARDING} 设为 {layout.sharding * layout.data}",
            ),
        )


def _world(layout: Layout, world: int | None) -> Iterator[Problem]:
    needed = layout.tensor * layout.pipe * layout.sharding
    if world is not None and world % needed:
        yield (
            TENSOR if layout.tensor > 1 else PIPE if layout.pipe > 1 else SHARDING,
            say(
                f"{TENSOR} ({layout.tensor}) * {PIPE} ({layout.pipe}) * {SHARDING} ("
                f"{layout.sharding}) = {needed} must divide the number of processes ({world}); start "
                f"{max(needed, world // needed * needed)}, or lower a degree",
                f"{TENSOR}（{layout.tensor}）× {PIPE}（{layout.pipe}）× {SHARDING}（"
                f"{layout.sharding}）= {needed} 须整除进程数（{world}）；请启动 "
                f"{max(needed, world // needed * needed)} 个，或降低某个并行度",
            ),
        )


def legal_layouts(model: ModelConfig, world: int, *, accumulation: int | None = None) -> list[Layout]:
    """Every legal layout on `world` ranks without virtual stages: data replicas share optimizer
    states (sharding stage 1).
    """
    found = []
    for tensor in _divisors(world):
        if list(_uneven(model, tensor)):
            continue
        for pipeline in (p for p in _divisors(world // tensor) if p <= model.num_hidden_layers):
            shared = world // tensor // pipeline
            wide = _divisors(shared) if model.moe is not None else [1]
            for factor in wide:
                layout = Layout(
                    tensor=tensor,
                    pipe=pipeline,
                    sharding=shared,
                    expert=tensor * factor if model.moe is not None else 1,
                    sequence_parallel=tensor > 1,
                    sharding_stage=int(shared > 1),
                )
                if not problems(model, layout, world=world, accumulation=accumulation):
                    found.append(layout)
    return found


def nearest(
    model: ModelConfig, layout: Layout, world: int, count: int = 3, accumulation: int | None = None
) -> list[Layout]:
    """The legal layouts on `world` ranks that differ least from `layout`, in powers of two of its
    degrees; the tensor degree counts most.
    """

    def distance(other: Layout) -> float:
        pairs = (
            (2.0, layout.tensor, other.tensor),
            (1.5, layout.pipe, other.pipe),
            (1.0, layout.expert, other.expert),
            (0.5, layout.sharding, other.sharding),
        )
        return sum(weight * abs(math.log2(a / b)) for weight, a, b in pairs)

    return sorted(legal_layouts(model, world, accumulation=accumulation), key=distance)[:count]


def check_run(p: ParallelArguments, accumulation: int, model: ModelConfig, world: int | None = None) -> None:
    """Refuse settings whose layout `model` cannot have. `world`: processes that run, None where
    that is not known yet.

    Raises ValueError: one line for every broken rule, then the nearest legal layouts on as many
    ranks.
    """
    found = run_problems(p, accumulation, model, world)
    if found:
        raise ValueError("\n".join(message for _, message in found))


def run_problems(
    p: ParallelArguments, accumulation: int, model: ModelConfig, world: int | None = None
) -> list[Problem]:
    """What `check_run` refuses, each with the setting to point at; the last one also names the
    nearest legal layouts.
    """
    layout = Layout.of(p, world)
    found = list(_unbuilt(p)) + problems(model, layout, world=world, accumulation=accumulation)
    if found:
        ranks = world or layout.world
        others = nearest(model, layout, ranks, accumulation=accumulation)
        shown = "; ".join(f"{other} ({_spelled(other)})" for other in others)
        name, message = found[-1]
        near = say(
            "{message}\nnearest layouts on {ranks} card(s): {shown}",
            "{message}\n{ranks} 张卡上可用的相近布局：{shown}",
            message=message,
            ranks=ranks,
            shown=shown or say("none", "无"),
        )
        found[-1] = (name, near)
    return found


def _spelled(layout: Layout) -> str:
    return (
        " ".join(
            f"{name}={value!r}" if " " in value else f"{name}={value}" for name, value in layout.settings().items()
        )
        or "no parallel settings"
    )


def _unbuilt(p: ParallelArguments) -> Iterator[Problem]:
    for name, instead in (
        ("context_parallel_size", f"{TENSOR} with sequence_parallel"),
        ("sep_parallel_size", f"{TENSOR} with sequence_parallel"),
        ("expert_tensor_model_parallel_size", EXPERT),
    ):
        value = vars(p)[name]
        if value > 1:
            yield (
                name,
                say(
                    f"{name} ({value}) must be 1: experts and sequences are cut by other axes here; use {instead}",
                    f"{name}（{value}）须为 1：这里专家与序列由其他轴切分；请用 {instead}",
                ),
            )

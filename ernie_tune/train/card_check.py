"""Does a card compute what a CPU computes, and how fast? Operators, steps of small models and of
two layers of the released width, memory, rates: one line each, with a verdict.

The reference is the CPU in float64 (wide layers beside a card: float32), without the fast paths
that are looked at: operators by their formulas (card_operators.py), models with all that the math
library does left to Paddle's operators, decoding by forwards of whole sequences. So the same lines,
made with the CPU in the card's place, show a fault of its own fast paths too.
Refuses to know: how lines are shown, several cards (`ernie-tune doctor --dist` has them talk).
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.language import Text, say
from ernie_tune.config.layout import Layout
from ernie_tune.data.batching import Sample, collate
from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models import mkl
from ernie_tune.models.attention import flash_holds
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.grouped import copy_holds, kernel_holds
from ernie_tune.models.inputs import Row, pack
from ernie_tune.models.presets import preset
from ernie_tune.models.proven import TOLERANCE, relative_error
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.quantize import quantize_base
from ernie_tune.plan.cards import card
from ernie_tune.plan.job import Job
from ernie_tune.plan.memory import memory
from ernie_tune.plan.time import flops_per_token
from ernie_tune.train.card_operators import OPERATORS, Operator
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule, build_adamw
from ernie_tune.train.sft import SFTObjective

RELEASED = "ernie-4.5-vl-28b-a3b"
STEPS = 3
# of the loss of a step, beside the reference's
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
_ROW_TOKENS, _PICTURE_PATCHES = 160, 16  # a picture of 16 x 16 patches is 64 tokens


@dataclass(frozen=True)
class CheckLine:
    """One finding: what was looked at, what came out, and whether it is as it should be (None: a
    figure, nothing to judge).
    """

    about: str
    found: str
    passed: bool | None = None


def check_card(device: str) -> Iterator[CheckLine]:
    """The lines for a device ("gpu:0", "cpu"), as they are found. The device is the process's own
    again afterwards.
    """
    before = paddle.get_device()
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    try:
        for dtype in dtypes:
            for name, operator in OPERATORS.items():
                yield operator_line(name, operator, device, dtype)
        if device != "cpu":
            yield from _fast_paths()
        rates = {dtype: _product_rate(device, dtype) for dtype in dtypes}
        for dtype, rate in rates.items():
            yield CheckLine(
                say(f"products, {dtype}", f"矩阵乘，{dtype}"),
                f"{rate / 1e12:.3g} TFLOP/s",
            )
        yield CheckLine(say("copying memory", "内存复制"), f"{_copy_rate(device) / 1e9:.3g} GB/s")
        yield from _models(device, dtypes, rates)
        if device != "cpu":
            yield _memory(device)
        for quantised in (False, True):
            yield decoding_line(device, dtypes[-1], quantised)
    finally:
        paddle.set_device(before)


# --- operators ---------------------------------------------------------------------------------


def operator_line(name: str, operator: Operator, device: str, dtype: str) -> CheckLine:
    """The library's operator on a device beside its formula in float64 on the CPU."""
    about = say(f"operator {name}, {dtype}", f"算子 {name}，{dtype}")
    paddle.set_device("cpu")
    want = operator.results(lambda array: paddle.to_tensor(array), plain=True)
    paddle.set_device(device)
    try:
        got = operator.results(lambda array: paddle.to_tensor(array).astype(dtype))
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
        return CheckLine(about, _short(error), False)
    tolerance = TOLERANCE[getattr(paddle, dtype)]
    worst = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
    return CheckLine(about, _off(worst, tolerance), bool(worst <= tolerance))


def _off(worst: float, tolerance: float) -> str:
    return say(f"off by {worst:.1e}, {tolerance:.0e} allowed", f"相差 {worst:.1e}，允许 {tolerance:.0e}")


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:120] if lines else ''}"


def _fast_paths() -> Iterator[CheckLine]:
    """Which of a card's own kernels have proven themselves, for the released shapes."""
    config = preset(RELEASED)
    if config.moe is None:
        raise AssertionError("the released model has experts")
    paddle.set_device("gpu:0")
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    inner, dtype = config.moe.intermediate_size[0], paddle.bfloat16
    yield _used(say("flash attention, bfloat16", "flash 注意力，bfloat16"), flash_holds(*heads, True, dtype))
    both = [kernel_holds(*shape, dtype) for shape in ((config.hidden_size, 2 * inner), (inner, config.hidden_size))]
    yield _used(say("experts in one grouped product, bfloat16", "专家分组矩阵乘，bfloat16"), all(both))
    yield _used(say("counts copied while the card works", "计数与计算并行拷贝"), copy_holds())


def _used(about: Text, held: bool) -> CheckLine:
    return CheckLine(about, say("used", "启用") if held else say("not used: see above", "未启用：见上"), held)


# --- models ------------------------------------------------------------------------------------


def wide_config() -> ModelConfig:
    """Two layers of the released width, one dense and one with eight of its experts, two blocks of
    its vision tower, and a small vocabulary.
    """
    config = preset(RELEASED)
    small = preset("small")
    if config.moe is None or config.vision is None:
        raise AssertionError("the released model has experts and a tower")
    moe = dataclasses.replace(config.moe, num_experts=8, layer_indices=(1,))
    vision = dataclasses.replace(config.vision, depth=2)
    return config.replace(num_hidden_layers=2, moe=moe, vision=vision, vocab_size=small.vocab_size, tokens=small.tokens)


def _models(device: str, dtypes: Sequence[str], rates: dict[str, float]) -> Iterator[CheckLine]:
    small, wide = preset("small"), wide_config()
    cases = {
        say("small, all weights", "small，全部权重"): (small, False, "float64"),
        say("small, LoRA", "small 模型，LoRA"): (small, True, "float64"),
        say("two layers of the 28B's width, LoRA", "28B 宽度的两层，LoRA"): (wide, True, "float32"),
    }
    for about, (config, lora, reference) in cases.items():
        # with the CPU in the card's place the wide layers are compared with float64
        exact = "float64" if device == "cpu" else reference
        with mkl.left_alone():
            want, _ = _steps("cpu", exact, config, lora)
        for dtype in dtypes:
            title = say(f"step of {about}, {dtype}", f"训练步：{about}，{dtype}")
            try:
                got, seconds = _steps(device, dtype, config, lora)
            except (RuntimeError, ValueError, OSError, MemoryError) as error:
                yield CheckLine(title, _short(error), False)
                continue
            off = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
            tokens = 2 * _ROW_TOKENS
            job = Job(config, method="LoRA" if lora else "Full", lora=_lora() if lora else None, row_tokens=_ROW_TOKENS)
            # frozen weights get no gradient: a third of the operations is not there
            flops = flops_per_token(job) * (2 / 3 if lora else 1)
            share = flops * tokens / seconds / rates[dtype]
            speed = say(
                f"{tokens / seconds:.0f} tokens/s, {share:.0%} of the product rate",
                f"{tokens / seconds:.0f} token/s，为矩阵乘速率的 {share:.0%}",
            )
            yield CheckLine(title, f"{_off(off, LOSS_TOLERANCE[dtype])}; {speed}", off <= LOSS_TOLERANCE[dtype])


def _lora() -> LoraConfig:
    return LoraConfig(r=8, target_modules=["attention"])


def _steps(device: str, dtype: str, config: ModelConfig, lora: bool) -> tuple[list[float], float]:
    """Losses of a few steps on rows with pictures, and seconds of the fastest."""
    paddle.set_device(device)
    model: Any = AutoModel.from_config(config, seed=1, dtype=dtype)
    if lora:
        model = get_peft_model(model, _lora())
    window = [collate([_sample(config, seed) for seed in range(2)], config.tokens)]
    optimizer = build_adamw(
        list(model.named_parameters()), lambda _: 1.0, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8
    )
    loop = Loop(model, SFTObjective(), optimizer, Schedule(1e-4, STEPS), LoopSettings())
    records = list(loop.steps([window] * STEPS))
    del model, optimizer, loop
    gc.collect()
    return [r.loss for r in records], min(r.seconds for r in records)


def _sample(config: ModelConfig, seed: int) -> Sample:
    rng, tokens, side = np.random.default_rng(seed), config.tokens, _PICTURE_PATCHES
    ids = rng.integers(10, 7900, _ROW_TOKENS)
    ids[1 : 1 + side**2 // 4] = int(tokens.image or 0)
    pixels = rng.standard_normal((side**2, 588)).astype(np.float32)
    trained = ids != tokens.image
    return Sample(Row(ids, pixels, np.array([[1, side, side]])), trained, trained.astype(np.float32))


def _memory(device: str) -> CheckLine:
    """The largest memory of a LoRA step, beside what an estimate counts for it."""
    config = preset("small")
    paddle.set_device(device)
    paddle.device.cuda.empty_cache()
    paddle.device.cuda.reset_max_memory_allocated()
    _steps(device, "bfloat16", config, lora=True)
    used = paddle.device.cuda.max_memory_allocated()
    visual = 2 * _PICTURE_PATCHES**2 // 4
    job = Job(config, method="LoRA", lora=_lora(), rows=2, row_tokens=_ROW_TOKENS, visual_tokens=visual)
    items = memory(job, Layout(), card("80g")).items
    counted = sum(v for k, v in items.items() if k not in ("process and context", "fragmentation"))
    return CheckLine(
        say("memory of a LoRA step of small", "small 的 LoRA 训练步内存"),
        say(f"{used / 1e6:.0f} MB, {counted / 1e6:.0f} estimated", f"{used / 1e6:.0f} MB，估计 {counted / 1e6:.0f}"),
    )


# --- rates -------------------------------------------------------------------------------------


def _best(function: Callable[[], Tensor], rounds: int = 5) -> float:
    """Seconds of the fastest round; the result is read, so that a device has finished."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        float(function().reshape([-1])[0])
        best = min(best, time.perf_counter() - start)
    return best


def _product_rate(device: str, dtype: str) -> float:
    paddle.set_device(device)
    size = 1024 if device == "cpu" else 8192
    a = paddle.ones([size, size], dtype)
    return 2 * size**3 / _best(lambda: paddle.matmul(a, a))


def _copy_rate(device: str) -> float:
    paddle.set_device(device)
    x = paddle.ones([2**26 if device == "cpu" else 2**28], "float32")
    return 2 * 4 * x.shape[0] / _best(lambda: x + 0.0)


def decoding_line(device: str, dtype: str, quantised: bool, name: str = "small", rows: int = 8) -> CheckLine:
    """Greedy tokens a second, one step after the other, and how far their log-probabilities are
    from those of whole sequences in one forward of float64. `quantised`: on int8 and int4 codes.
    """
    paddle.set_device(device)
    model = _speaking(name, dtype, quantised)
    last = min(7900, model.config.vocab_size)
    given = [Row(np.random.default_rng(seed).integers(10, last, 64)) for seed in range(rows)]
    start = time.perf_counter()
    done = generate(model, given, model.config.tokens, SamplingParams(max_new_tokens=16, temperature=0.0))
    seconds = time.perf_counter() - start
    got = np.concatenate([answers[0].logps for answers in done])
    paddle.set_device("cpu")
    with mkl.left_alone(), paddle.no_grad():
        model, want = _speaking(name, "float64", quantised), []
        for row, (answer,) in zip(given, done, strict=True):
            ids = np.concatenate([row.input_ids_L, np.array(answer.token_ids, np.int64)])
            scores = model.logits(model(pack([Row(ids)], model.config.tokens))).numpy()[63:-1]
            top = scores.max(-1, keepdims=True)
            log = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
            want.append(log[np.arange(len(log)), ids[64:]])
    tolerance = TOLERANCE[getattr(paddle, dtype)]
    off = relative_error(got, np.concatenate(want))
    about = (
        say(f"decoding of {name} on int8 and int4 codes, {dtype}", f"{name} 在 int8 与 int4 编码上解码，{dtype}")
        if quantised
        else say(f"decoding of {name}, {dtype}", f"{name} 解码，{dtype}")
    )
    speed = say(f"{len(got) / seconds:.0f} tokens/s", f"每秒 {len(got) / seconds:.0f} 个 token")
    return CheckLine(
        about, say("{off}; {speed}", "{off}；{speed}", off=_off(off, tolerance), speed=speed), bool(off <= tolerance)
    )


def _speaking(name: str, dtype: str, quantised: bool) -> Any:
    model = AutoModel.from_config(name, seed=1, dtype=dtype)
    model.eval()
    return quantize_base(model, "weight_only_mix") if quantised else model

"""Whether a fast path of a device may be trusted: before its first use it is tried on a few numbers
against the plain path, forward and backward, and left alone where the two differ or it fails.

No machine that this library is tested on has every card, so a kernel proves itself where it runs.
Refuses to know: which paths there are, models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say

# Largest difference beside the largest value of the plain path, by the number format's precision.
TOLERANCE = {paddle.float64: 1e-10, paddle.float32: 1e-4, paddle.float16: 1e-2, paddle.bfloat16: 4e-2}

_verdicts: dict[Hashable, bool] = {}
_trying: list[Hashable] = []


def proven(
    name: str,
    key: Hashable,
    dtype: paddle.dtype,
    fast: Callable[[], Sequence[Tensor]],
    plain: Callable[[], Sequence[Tensor]],
) -> bool:
    """Whether `fast` gives what `plain` gives, tried once a `key` (what the kernel's choice depends
    on) and process; a line on stderr says so where it does not. `fast` and `plain` return values
    and gradients of the same small inputs, in one order.
    """
    case = (name, key, str(dtype), paddle.get_device())
    if case in _verdicts:
        return _verdicts[case]
    if case in _trying:  # `fast` itself asks: the trial goes through it
        return True
    _trying.append(case)
    try:
        reason = _difference(fast(), plain(), TOLERANCE[dtype])
    except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    finally:
        _trying.remove(case)
    _verdicts[case] = not reason
    if reason:
        print(
            say(
                f"ernie_tune: {name} does not hold on {paddle.get_device()} ({reason}): the plain path is used, slower and safe",
                f"ernie_tune：{name} 在 {paddle.get_device()} 上不可用（{reason}）：改用普通路径，较慢但可靠",
            ),
            file=sys.stderr,
            flush=True,
        )
    return _verdicts[case]


def verdicts() -> dict[str, bool]:
    """What was tried in this process: name and number format -> whether it is used."""
    return {
        f"{case[0]}, {case[2].rsplit('.', 1)[-1]}": held for case, held in _verdicts.items() if isinstance(case, tuple)
    }


def _difference(fast: Sequence[Tensor], plain: Sequence[Tensor], tolerance: float) -> str:
    """What differs, in words; empty where nothing does."""
    for number, (got, want) in enumerate(zip(fast, plain, strict=True)):
        a, b = (x.astype("float32").numpy() for x in (got, want))
        off = relative_error(a, b)
        if not off <= tolerance:
            return say(
                f"result {number} differs by {off:.1e}, {tolerance:.0e} is allowed",
                f"第 {number} 个结果相差 {off:.1e}，允许 {tolerance:.0e}",
            )
    return ""


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference beside the largest value wanted; NaN where a value is none."""
    if got.shape != want.shape:
        return float("nan")
    return float(np.abs(got - want).max(initial=0.0) / max(float(np.abs(want).max(initial=0.0)), 1e-30))

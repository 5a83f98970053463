"""After the first optimizer step: are replicas still equal to the bit, and did every trained
parameter move? A wrong layout is told before an hour is lost.

Refuses to know: models, how a layout came about.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.parallel.mesh import Mesh
from ernie_tune.parallel.placement import owners, placement_of


def fingerprint(x: Tensor) -> int:
    """CRC32 of the values' bytes."""
    plain = x.astype("float32") if x.dtype in (paddle.bfloat16, paddle.float16) else x
    return zlib.crc32(np.ascontiguousarray(plain.numpy()).tobytes())


def fingerprints(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Of every parameter, by name."""
    return {name: fingerprint(value) for name, value in parameters.items()}


def check_replicas(parameters: Mapping[str, Tensor], mesh: Mesh) -> None:
    """RuntimeError naming a parameter and the axis over which its copies differ."""
    mine = fingerprints(parameters)
    for axis in ("tensor", "batch", "expert_data", "pipe"):
        group = mesh.group(axis)
        if group.size == 1:
            continue
        shared = {n: mine[n] for n, value in parameters.items() if axis == "pipe" or axis in owners(value)}
        said = group.objects(shared)
        for name, value in shared.items():
            if any(other.get(name, value) != value for other in said):
                raise RuntimeError(
                    say(
                        f"parameter {name} differs between the {axis} ranks {list(group.ranks)} after the first "
                        "step, where it must be equal: its gradients "
                        "are not summed over them; report the layout, or train without that axis",
                        f"第一步之后参数 {name} 在 {axis} 组的进程 {list(group.ranks)} 之间不同，而它们须相同：其梯度没有跨进程求和；请报告此并行布局，或去掉该并行方式训练",
                    )
                )


def check_moved(before: Mapping[str, int], parameters: Mapping[str, Tensor], touched: set[str], mesh: Mesh) -> None:
    """RuntimeError naming a parameter that had a gradient anywhere (`touched`) and did not change
    on any rank that holds a part of it.
    """
    names = sorted(touched)
    if not names:
        return
    moved = [name in parameters and fingerprint(parameters[name]) != before[name] for name in names]
    anywhere = mesh.group("stage").reduce_(paddle.to_tensor(np.array(moved, np.int32)), dist.ReduceOp.MAX).numpy()
    still = [name for name, flag in zip(names, anywhere.tolist(), strict=True) if not flag]
    if still:
        split = placement_of(parameters[still[0]]).group if still[0] in parameters else ""
        where = f"split over the {split} ranks" if split else "whole on every rank"
        raise RuntimeError(
            say(
                f"parameter {still[0]} ({where}; {len(still)} in all) has a gradient but did not change in the "
                "first step; "
                "the optimizer does not see it: report the layout, or train without sharding",
                f"参数 {still[0]}（{where}；共 {len(still)} 个）有梯度，但第一步没有改变；优化器没有看到它：请报告此并行布局，或不用 sharding 训练",
            )
        )

"""An optimizer's tensors by the canonical names of the parameters they belong to, and back.

Refuses to know: files, layouts, which optimizer it is beyond Paddle's slots.
"""

from __future__ import annotations

from collections.abc import Mapping

import paddle
from paddle import Tensor
from paddle.utils import unique_name

from ernie_tune.config.language import say


def optimizer_arrays(optimizer: paddle.optimizer.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's tensors as "<canonical parameter name>/<slot>": Paddle's own keys hold
    counters that change from run to run.
    """
    by_paddle_name = {p.name: name for name, p in named.items()}
    out: dict[str, Tensor] = {}
    state = optimizer.state_dict()
    for key, value in state.items():
        if key == "master_weights":
            out.update({f"{by_paddle_name[p]}/master": v for p, v in value.items()})
        elif isinstance(value, Tensor):
            owner = max((p for p in by_paddle_name if key.startswith(p + "_")), key=len, default=None)
            if owner is None:
                raise ValueError(
                    say(
                        f"optimizer state {key!r} must belong to a parameter of the model; rebuild the optimizer after changing layers",
                        f"优化器状态 {key!r} 须属于模型的某个参数；修改层之后请重建优化器",
                    )
                )
            out[f"{by_paddle_name[owner]}/{key[len(owner) + 1 :]}"] = value
    return out


def load_optimizer_arrays(
    optimizer: paddle.optimizer.Optimizer, named: Mapping[str, Tensor], arrays: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_arrays`, on an optimizer that has made no step. Raises ValueError for
    arrays of parameters that the model does not train.
    """
    unknown = sorted({key.rsplit("/", 1)[0] for key in arrays} - set(named))
    if unknown:
        raise ValueError(
            say(
                f"optimizer state of {unknown[:5]} must belong to trainable parameters; resume with the settings of the saved run",
                f"{unknown[:5]} 的优化器状态须属于可训练的参数；请以保存时的设置恢复训练",
            )
        )
    state: dict[str, object] = {}
    masters: dict[str, Tensor] = {}
    for key, value in arrays.items():
        name, slot = key.rsplit("/", 1)
        if slot == "master":
            value.name = f"{named[name].name}_fp32_master_0"  # Paddle names the moments after it
            masters[named[name].name] = value
        else:
            state[f"{named[name].name}_{slot}"] = value
    if masters:
        state["master_weights"] = masters
    optimizer.set_state_dict(state)
    # Made now, not at their first gradient: Paddle would then refuse a parameter that the saved run
    # had not yet reached. What the optimizer updates may be a flat slice of a parameter, with its
    # name.
    own = {p.name: p for p in updated_by(optimizer)}
    with unique_name.guard():
        optimizer._create_accumulators(
            paddle.static.default_main_program().global_block(),
            [own[named[name].name] for name in dict.fromkeys(key.rsplit("/", 1)[0] for key in arrays)],
        )


def updated_by(optimizer: paddle.optimizer.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer updates, of all its groups."""
    groups = [g["params"] if isinstance(g, dict) else [g] for g in optimizer._parameter_list]
    return [p for group in groups for p in group]

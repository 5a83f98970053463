"""Where adapters sit: a `Slot` is a sublayer of the module it changes, holds that module's adapters
by name, and lets the active one act.

A module keeps its class, its parameters and their names; the slot acts through a forward hook, so
it does not matter whether the module is a plain, a quantised or a parallel layer. Parameters are
called `<module>.adapters.<adapter>.<tensor>`. Refuses to know: what an adapter computes.
"""

from __future__ import annotations

from typing import Any

from paddle import Tensor, nn

NAME = "adapters"

# How a sharding table cuts the adapters of a layer that it cuts by columns or rows: tensor ->
# (axis; whether the gradient of a whole one is a partial sum).
ADAPTER_PLAN: dict[str, dict[str, tuple[int | None, bool]]] = {
    "column": {"lora_A": (None, True), "lora_B": (1, False), "magnitude": (0, False), "prefix": (0, False)},
    "row": {"lora_A": (0, False), "lora_B": (None, True), "magnitude": (None, True)},
}


class Slot(nn.Layer):
    """The adapters of one module. An adapter is called with the module, its arguments and its
    output, and returns the new output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None

    def forward(self, module: nn.Layer, args: tuple[Any, ...], out: Tensor) -> Tensor:
        adapter = None if self.active is None else self._sub_layers.get(self.active)
        return out if adapter is None else adapter(module, args, out)

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """What the active adapter says under that name; None where none acts, or does more."""
        adapter = None if self.active is None else self._sub_layers.get(self.active)
        found: tuple[Tensor, Tensor, float] | None = None if adapter is None else adapter.low_rank()
        return found


def _act(module: nn.Layer, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return module.adapters(module, args, out)


def attach(module: nn.Layer, name: str, adapter: nn.Layer) -> None:
    """Put `adapter` under `name` into the module's slot, which is made on first use."""
    if NAME not in module._sub_layers:
        slot = Slot()
        slot.training = module.training
        slot.hook = module.register_forward_post_hook(_act)
        module.add_sublayer(NAME, slot)
    adapter.train() if module.training else adapter.eval()
    module.adapters.add_sublayer(name, adapter)


def detach(module: nn.Layer, name: str) -> None:
    """Take the adapter out; a slot left empty goes too."""
    slot = module.adapters
    del slot._sub_layers[name]
    if not slot._sub_layers:
        slot.hook.remove()
        del module._sub_layers[NAME]

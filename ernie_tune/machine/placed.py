"""One model on the mesh: what is called for it, the engine that trains it, where its parameters
lie, and how its weights are written and taken back.

`Place.put` makes one. Several models of a run are each placed on their own, trained or not, and
know nothing of each other. Refuses to know: methods, data, settings, what is logged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.names import check_names, detect_flavour, layout
from ernie_tune.checkpoint.sharded import Region, Shards
from ernie_tune.checkpoint.source import OnDisk, Source, Where, fill
from ernie_tune.checkpoint.tensors import FLOAT_CODES, TensorReader, cast
from ernie_tune.config.language import say
from ernie_tune.machine.alone import LocalEngine
from ernie_tune.machine.fleet import DistributedEngine, Laid
from ernie_tune.machine.in_step import InStep
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.specs import ROUTER_BIAS
from ernie_tune.parallel.gather import Gathered
from ernie_tune.parallel.placement import placement_of
from ernie_tune.peft import build
from ernie_tune.peft.config import PrefixConfig, PromptConfig
from ernie_tune.peft.files import read_adapter
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import takers

if TYPE_CHECKING:
    from ernie_tune.machine.place import Place


class Placed:
    """`forward` is what is called for `model`: itself, or its stages together. `engine`: None for a
    model that is only asked. `whole`: each parameter's shape before it was split, and where an
    adapter's file entries come from."""

    def __init__(
        self,
        model: ErnieModel,
        place: Place,
        engine: LocalEngine | None,
        forward: Any,
        whole: Whole | None = None,
    ) -> None:
        self.model, self.place, self.forward = model, place, forward
        self._engine, self._whole = engine, whole or Whole()
        self.moves_router_bias = False  # whether training moves them, without a gradient

    @property
    def engine(self) -> LocalEngine:
        """What trains the model, here or over the mesh."""
        if self._engine is None:
            raise AssertionError("put(model, trained=True) makes an engine")
        return self._engine

    def beside(self) -> Placed:
        """The same model where it lies, with an engine of its own for what is trained of it now:
        another adapter than this one's."""
        own, engine = LocalEngine(), self.engine
        if isinstance(engine, DistributedEngine):
            own = DistributedEngine(self.model, self.place.mesh, engine.runs, engine.staged)
        return Placed(self.model, self.place, own, self.forward, self._whole)

    def describe(self) -> str:
        """One line: the degrees above 1, and where the pipeline is cut."""
        cut = getattr(self.forward, "cut", None)
        stages = [] if cut is None else [f"stages begin at {list(cut.bounds[:-1])} of {len(cut.items)} items"]
        return ", ".join([self.place.mesh.describe(), *stages])

    def trained(self) -> dict[str, Tensor]:
        """The parameters that an optimizer moves, by canonical name; on a mesh this rank's parts of
        them."""
        return {name: p for name, p in self.model.named_parameters() if not p.stop_gradient}

    def moved(self) -> dict[str, Tensor]:
        """All that training changes of the model, by canonical name: what is trained, and the
        routers' biases where they move.
        """
        if not self.moves_router_bias:
            return self.trained()
        return {
            name: p for name, p in self.model.named_parameters() if not p.stop_gradient or name.endswith(ROUTER_BIAS)
        }

    def whole(self) -> AbstractContextManager[None]:
        """A `with` in which this rank has every part it should, where sharding stage 3 keeps them
        apart."""
        return nullcontext() if self._engine is None else self._engine.whole()

    @contextlib.contextmanager
    def answering(self) -> Iterator[Any]:
        """A `with` in which each rank calls what this gives as often as its own rows need, without
        a gradient; all ranks enter and leave it.
        """
        with self.whole():
            if not self.place.mesh.layout.fleet_experts:
                yield self.forward
                return
            together = InStep(self.forward, self.place.mesh.group("expert"))
            yield together
            together.finish()

    def optimizer(self, make: Callable[[list[Tensor]], Any]) -> Any:
        """What updates the trained parameters. `make` gives an optimizer of Paddle for a list of
        them; on a mesh it is called for each part of them."""
        engine = self.engine
        return engine.optimizer(make) if isinstance(engine, DistributedEngine) else make(list(self.trained().values()))

    def region(self, name: str, parameter: Tensor) -> Region:
        """Where this rank's part of a parameter lies in the whole."""
        whole = self._whole.shapes.get(name, tuple(parameter.shape))
        placement = placement_of(parameter)
        if placement.axis is None:
            return Region.block(whole)
        indices = placement.indices(whole[placement.axis])
        offset, shape = [0] * len(whole), list(whole)
        offset[placement.axis], shape[placement.axis] = (indices[0] if len(indices) else 0), len(indices)
        return Region.block(whole, tuple(offset), tuple(shape))

    def shards(self, named: Mapping[str, Tensor]) -> Shards:
        """Where the trained parameters lie, and of which this rank's optimizer has the state."""
        regions = {name: self.region(name, p) for name, p in named.items()}
        if not isinstance(self._engine, DistributedEngine):
            return Shards(regions)
        owners = self._engine.owner_of
        nothing = {}
        for name, p in named.items():
            group = "expert_data" if placement_of(p).expert and self.place.mesh.layout.fleet_experts else "sharding"
            if owners.get(p.name, self.place.mesh.rank_in(group)) != self.place.mesh.rank_in(group):
                nothing[name] = regions[name].run(0, 0)
        return Shards(regions, nothing)

    def save(self, folder: Path) -> None:
        """`save_pretrained` of the whole model or adapter, written by rank 0; the others hand it
        their parts, one tensor at a time."""
        model: Any = self.model
        if not self.place.several:
            model.save_pretrained(folder)
            return
        with self.whole():
            held = {name: (self.region(name, p), p) for name, p in model.named_parameters()}
            tensors = Gathered(held, self.place.mesh.group("world"))
            if isinstance(model, PeftModel):
                self._save_adapter(model, folder, tensors)
            elif self.place.is_writer:
                with tensors.leading():
                    model.save_pretrained(folder, whole=tensors.ask)
            else:
                tensors.follow()

    def _save_adapter(self, model: PeftModel, folder: Path, tensors: Gathered) -> None:
        config = model.adapters[model.active or ""].config
        whole = {name: tensors.get(name) for name in sorted({name for name, _ in self._whole.adapter.values()})}
        if not self.place.is_writer:
            return
        arrays: dict[str, np.ndarray] = {}
        for key, (name, row) in self._whole.adapter.items():
            value = whole[name]
            if value is None:
                raise AssertionError("rank 0 gathers")
            value = cast(value, FLOAT_CODES[tensors.kind(name)], "F32")
            arrays[key] = value if row is None else value[row]
        if isinstance(config, PrefixConfig):
            stack = np.stack([arrays.pop(key) for key in list(arrays) if key.endswith(".prefix")])
            arrays["prefix"] = stack.reshape(-1, 2, *stack.shape[1:])
        if isinstance(config, PromptConfig):  # on rank 0, the first stage
            arrays = {key: value for key, value in arrays.items() if not key.startswith("embed_tokens.")}
            arrays.update(model.exported())
        model.save_pretrained(folder, tensors=arrays)

    def take(self, folder: Path) -> None:
        """Put what `save` wrote back into the model, each rank its part. ValueError, on all ranks,
        where it is of another model or adapter."""
        model = self.model
        if not self.place.several:
            load_weights(model, folder)
        elif isinstance(model, PeftModel):
            self.place.together(lambda: self._take_adapter(model, folder))
        else:
            self.place.together(lambda: load_weights(model, folder, Laid.part))

    def _take_adapter(self, model: PeftModel, folder: Path) -> None:
        tensors = adapter_tensors(model, folder)
        if "prefix" in tensors:
            prefix = tensors.pop("prefix")
            tensors |= zip(self._whole.adapter, prefix.reshape(-1, *prefix.shape[2:]), strict=True)
        if "prompt" in tensors:
            tensors["embed_tokens.prompt"] = tensors.pop("prompt")
        check_adapter(folder, tensors, self._whole.adapter)
        parts: dict[str, list[np.ndarray]] = {}
        stacks = {name for name, row in self._whole.adapter.values() if row is not None}
        for key, (name, _) in self._whole.adapter.items():
            parts.setdefault(name, []).append(tensors[key])
        for name, value in model.named_parameters():
            if name in parts:
                whole = np.stack(parts[name]) if name in stacks else parts[name][0]
                if whole.shape != self._whole.shapes[name]:
                    raise ValueError(
                        say(
                            f"{folder}: {name} {list(whole.shape)} must be {list(self._whole.shapes[name])}; take an "
                            "adapter of the same settings",
                            f"{folder}：{name} {list(whole.shape)} 须为 {list(self._whole.shapes[name])}"
                            "；请用相同设置的适配器",
                        )
                    )
                value.set_value(paddle.to_tensor(whole[Laid.part(value, whole.shape)]).astype(value.dtype))


class Whole:
    """What of a model must be known before it is split: shapes by name, and of the active adapter
    what each entry of its file is, (parameter, row of a stack)."""

    def __init__(self, model: ErnieModel | None = None) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.adapter: dict[str, tuple[str, int | None]] = {}
        if model is not None:
            self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if isinstance(model, PeftModel):
            names = {id(p): name for name, p in model.named_parameters()}
            self.adapter = {key: (names[id(p)], row) for key, p, row in model.adapter_entries()}


def read_parts(model: ErnieModel, source: Source, where: Where | None = None) -> None:
    """Give a model its values; where it lies over ranks, `where` says which part of each is here.
    ValueError as `fill`."""
    with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
        fill(model, source, where=where, takers=takers(model))
    if isinstance(model, PeftModel):
        model.settle()


def copy_parts(model: ErnieModel, other: ErnieModel) -> None:
    """Give a model the values of one that lies as it does, by name; what only one of them has stays
    as it is."""
    values = other.state_dict()
    for name, value in model.state_dict().items():
        if name in values:
            value.set_value(values[name])


def load_weights(model: ErnieModel, folder: Path, where: Where | None = None) -> None:
    """Put the weights, or the adapter, that `save_pretrained` wrote into `folder` into `model`;
    with `where`, into a plain model that lies over ranks. ValueError where they are others."""
    if not isinstance(model, PeftModel):
        reader = TensorReader(folder)
        table = layout(model.config, detect_flavour(reader.shapes, model.config))
        check_names(table, reader.shapes)
        fill(model, OnDisk(table, reader), where=where)
        return
    adapter = model.adapters[model.active or ""]
    rest = build.fill(adapter.config, adapter.places, adapter_tensors(model, folder))
    check_adapter(folder, rest, adapter.copies)
    for name, value in rest.items():
        build.assign(adapter.copies[name], value, name)


def adapter_tensors(model: PeftModel, folder: Path) -> dict[str, np.ndarray]:
    """The whole tensors of the active adapter as `folder` has them. ValueError for a prompt whose
    encoder no file has."""
    config = model.adapters[model.active or ""].config
    if isinstance(config, PromptConfig) and config.encoder_width:
        raise ValueError(
            say(
                f"{folder} must hold the encoder of a P-tuned prompt, but adapter files hold only what it makes; save without save_only_model",
                f"{folder} 中须有 P-tuning 提示的编码器，而适配器文件只存它的结果；请不用 save_only_model 保存",
            )
        )
    return read_adapter(folder, model.config).tensors


def check_adapter(folder: Path, found: Collection[str], wanted: Collection[str]) -> None:
    """ValueError unless the tensors of an adapter are those that the run trains."""
    if set(found) != set(wanted):
        raise ValueError(
            say(
                f"adapter in {folder} must hold the tensors that this run trains, but "
                f"{sorted(set(found) ^ set(wanted))[:3]} differ; take another folder",
                f"{folder} 中的适配器须与本次训练的张量一致，但 {sorted(set(found) ^ set(wanted))[:3]} "
                "不同；请换一个文件夹",
            )
        )

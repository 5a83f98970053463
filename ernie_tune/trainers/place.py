"""This process's place in a run: alone, or one rank of a Fleet mesh; and what only several ranks need to start, save and stop together.

Refuses to know: methods, data, what is logged.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.sharded import Region
from ernie_tune.checkpoint.source import Source
from ernie_tune.checkpoint.tensors import FLOAT_CODES, cast
from ernie_tune.config.arguments import ParallelArguments, RunConfig
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.parallel.gather import Gathered
from ernie_tune.parallel.mesh import Degrees, Mesh, init_mesh
from ernie_tune.parallel.parallelize import equalise
from ernie_tune.parallel.pipeline import Cut as Segments
from ernie_tune.parallel.placement import placement_of
from ernie_tune.parallel.watch import Limits, Watch, launched_address
from ernie_tune.peft.config import PrefixConfig, PromptConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import quantize_base
from ernie_tune.plan.segments import bounds_of
from ernie_tune.train.distributed import DistributedEngine, Laid, spread, unkept
from ernie_tune.train.engine import Engine
from ernie_tune.train.pipeline import StagedForward
from ernie_tune.train.state import Cut
from ernie_tune.trainers import assemble

# Between two marks lie at most a step, a save, or one measurement of all held-out rows.
LIMITS = Limits(join=300.0, stuck=7200.0)


def degrees_of(p: ParallelArguments, world: int) -> Degrees:
    """The settings as degrees; what is left of `world` reads other rows. Raises ValueError where the world does not divide, and as `Degrees`."""
    stage, _, more = p.sharding.removeprefix("stage").partition(" ")
    if more:
        raise ValueError(f"sharding ({p.sharding}) must be without offload in this version; set stage{stage}")
    shards, laid = p.sharding_parallel_size, p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    if world % (laid * shards):
        raise ValueError(
            f"tensor_model_parallel_size x pipeline_model_parallel_size x sharding_parallel_size ({laid * shards}) must divide the number of processes "
            f"({world}); start {laid * shards} or a multiple of it (--nproc), or change the degrees"
        )
    rows = world // (laid * shards)
    return Degrees(
        tensor=p.tensor_model_parallel_size,
        pipe=p.pipeline_model_parallel_size,
        data=rows,
        sharding=shards,
        expert=p.expert_model_parallel_size,
        sharding_stage=int(stage) if p.sharding != "off" and shards > 1 else 0,
        sequence_parallel=p.sequence_parallel,
        virtual_pipe=p.virtual_pipeline_model_parallel_size,
    )


class Place:
    """`lay` puts a model on the mesh; until then, and on one process, it is as it was. Raises ValueError for degrees that cannot be, ConnectionError for
    ranks that do not come."""

    def __init__(self, parallel: ParallelArguments, accumulation: int = 1) -> None:
        world = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
        self.accumulation, self.segments = accumulation, parallel.pp_seg_method
        degrees = degrees_of(parallel, world)
        self.watch = _watch(world)
        self.mesh = init_mesh(degrees, accumulation=accumulation) if world > 1 else Mesh(degrees)
        self.engine: Engine = Engine()
        self._whole_shapes: dict[str, tuple[int, ...]] = {}
        self._adapter: dict[str, tuple[str, int | None]] = {}
        self._laid: Any = None
        self._cut: Segments | None = None  # of a pipeline
        self.source: Source | None = None  # what a model without values is read from

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.mesh.world > 1

    @property
    def is_writer(self) -> bool:
        return self.mesh.is_writer

    @property
    def batch(self) -> tuple[int, int]:
        """(rank, size) among the processes that read different rows."""
        return self.mesh.batch

    def describe(self) -> str:
        """One line: the degrees above 1, and where the pipeline is cut."""
        cut = self._cut
        stages = [] if cut is None else [f"stages begin at {list(cut.bounds[:-1])} of {len(cut.items)} items"]
        return ", ".join([self.mesh.describe(), *stages])

    # --- the ranks as checkpoints see them ---------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.mesh.rank_in("world")

    @property
    def size(self) -> int:
        return self.mesh.world

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        return self.mesh.group("world").objects(value)

    # --- the model ---------------------------------------------------------------------------------------------------

    def load(self, config: RunConfig) -> ErnieModel:
        """The model that the settings name. It comes without values, which are read when it is laid, where it would not fit before: as one of several
        processes, or when a quantised base is to be made of it."""
        if self.several or config.compute.weight_quantize_algo != "none":
            model, self.source = assemble.unread_model(config)
            return model
        return assemble.load_model(config)

    def measured(self, config: RunConfig, samples: Sequence[Any]) -> Any:
        """What expert affinity is measured on before the model gets its adapters, and with them its layout: a copy of it that lies over the ranks, for the
        time of measuring. None where there is nothing to measure, or the model has its values."""
        if not samples or self.source is None:
            return None
        if not self.several:
            return assemble.load_base(config)
        model, source = assemble.unread_model(config)
        if config.compute.weight_quantize_algo != "none":
            quantize_base(model, config.compute.weight_quantize_algo)
        laid = self._spread(model)
        self._together(lambda: assemble.read_parts(model, source, Laid.part))
        return DistributedEngine.over(model, self.mesh, laid, accumulation=self.accumulation).callable

    def _spread(self, model: ErnieModel) -> Laid:
        d = self.mesh.degrees
        bounds = bounds_of(self.segments, model.config.num_hidden_layers, d.pipe * d.virtual_pipe) if d.pipe > 1 else ()
        return spread(model, self.mesh, bounds)

    def lay(self, model: ErnieModel, training: bool = False) -> None:
        """Put `model`, with its adapters, on the mesh, once, and read its values if that is still to be done; where an optimizer comes next (`training`),
        without those that sharding stage 3 would let go of. ValueError for values that cannot be used."""
        if self._laid is model:
            return
        if not self.several:
            source, self.source, self._laid = self.source, None, model
            if source is not None:
                assemble.read_parts(model, source)
            return
        self._whole_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if isinstance(model, PeftModel):
            names = {id(p): name for name, p in model.named_parameters()}
            self._adapter = {key: (names[id(p)], row) for key, p, row in model.adapter_entries()}
        laid = self._spread(model)
        source, self.source, self._cut = self.source, None, laid.cut
        if source is not None:
            unread = unkept(model, self.mesh) if training else frozenset()
            self._together(
                lambda: assemble.read_parts(
                    model, source, lambda p, shape: None if p.name in unread else Laid.part(p, shape)
                )
            )
            if isinstance(model, PeftModel):  # DoRA's magnitudes are computed; all else is read alike
                for layer in (layer for adapter in model.adapters.values() for layer in adapter.places.values()):
                    equalise(layer, self.mesh)
        self.engine = DistributedEngine.over(model, self.mesh, laid, accumulation=self.accumulation)
        self._laid = model

    def _together(self, action: Callable[[], None]) -> None:
        """`action` on all ranks. Where it raises ValueError on some, all raise the first one's, so that none waits for them."""
        said = ""
        try:
            action()
        except ValueError as error:
            said = str(error)
        if wrong := [text for text in self.gather(said) if text]:
            raise ValueError(wrong[0])

    def asked(self, model: ErnieModel) -> Any:
        """What evaluation and generation call: the model, or its stages together."""
        return self.engine.callable if isinstance(self.engine, DistributedEngine) else model

    def lay_beside(self, model: ErnieModel) -> Any:
        """Put a model that is not trained, and has no values yet, on the mesh as the trained one is; returns what is called for it. `lay` comes first."""
        if not self.several:
            return model
        laid = spread(model, self.mesh, () if self._cut is None else self._cut.bounds)
        return model if laid.cut is None else StagedForward(model, laid.cut, self.mesh.group("pipe"), laid.runs)

    def optimizer(self, make: Callable[[list[Tensor]], Any]) -> Any:
        """The mesh's optimizer. `lay` comes first."""
        if not isinstance(self.engine, DistributedEngine):
            raise AssertionError("a mesh has its own optimizer, one process has Paddle's")
        return self.engine.optimizer(make)

    def region(self, name: str, parameter: Tensor) -> Region:
        """Where this rank's part of a parameter lies in the whole."""
        whole = self._whole_shapes.get(name, tuple(parameter.shape))
        placement = placement_of(parameter)
        if placement.axis is None:
            return Region.block(whole)
        indices = placement.indices(whole[placement.axis])
        offset, shape = [0] * len(whole), list(whole)
        offset[placement.axis], shape[placement.axis] = (indices[0] if len(indices) else 0), len(indices)
        return Region.block(whole, tuple(offset), tuple(shape))

    def cut(self, named: Mapping[str, Tensor]) -> Cut:
        """Where the trained parameters lie, and of which this rank's optimizer has the state."""
        regions = {name: self.region(name, p) for name, p in named.items()}
        if not isinstance(self.engine, DistributedEngine):
            return Cut(regions)
        owners = self.engine.owner_of
        nothing = {}
        for name, p in named.items():
            group = "expert_data" if placement_of(p).expert and self.mesh.degrees.fleet_experts else "sharding"
            if owners.get(p.name, self.mesh.rank_in(group)) != self.mesh.rank_in(group):
                nothing[name] = regions[name].run(0, 0)
        return Cut(regions, nothing)

    def save(self, model: Any, folder: Path) -> None:
        """`save_pretrained` of the whole model or adapter, written by rank 0; the others hand it their parts, one tensor at a time."""
        if not self.several:
            model.save_pretrained(folder)
            return
        with self.engine.whole():
            held = {name: (self.region(name, p), p) for name, p in model.named_parameters()}
            tensors = Gathered(held, self.mesh.group("world"))
            if isinstance(model, PeftModel):
                self._save_adapter(model, folder, tensors)
            elif self.is_writer:
                with tensors.leading():
                    model.save_pretrained(folder, whole=tensors.ask)
            else:
                tensors.follow()

    def _save_adapter(self, model: PeftModel, folder: Path, tensors: Gathered) -> None:
        config = model.adapters[model.active or ""].config
        whole = {name: tensors.get(name) for name in sorted({name for name, _ in self._adapter.values()})}
        if not self.is_writer:
            return
        arrays: dict[str, np.ndarray] = {}
        for key, (name, row) in self._adapter.items():
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

    def take(self, model: ErnieModel, folder: Path) -> None:
        """Put what `save` wrote back into the model, each rank its part. ValueError, on all ranks, where it is of another model or adapter."""
        if not self.several:
            assemble.load_weights(model, folder)
        elif isinstance(model, PeftModel):
            self._together(lambda: self._take_adapter(model, folder))
        else:
            self._together(lambda: assemble.load_weights(model, folder, Laid.part))

    def _take_adapter(self, model: PeftModel, folder: Path) -> None:
        tensors = assemble.adapter_tensors(model, folder)
        if "prefix" in tensors:
            prefix = tensors.pop("prefix")
            tensors |= zip(self._adapter, prefix.reshape(-1, *prefix.shape[2:]), strict=True)
        if "prompt" in tensors:
            tensors["embed_tokens.prompt"] = tensors.pop("prompt")
        assemble.check_adapter(folder, tensors, self._adapter)
        parts: dict[str, list[np.ndarray]] = {}
        stacks = {name for name, row in self._adapter.values() if row is not None}
        for key, (name, _) in self._adapter.items():
            parts.setdefault(name, []).append(tensors[key])
        for name, value in model.named_parameters():
            if name in parts:
                whole = np.stack(parts[name]) if name in stacks else parts[name][0]
                if whole.shape != self._whole_shapes[name]:
                    raise ValueError(
                        f"{folder}: {name} {list(whole.shape)} must be {list(self._whole_shapes[name])}; take an adapter of the same settings"
                    )
                value.set_value(paddle.to_tensor(whole[Laid.part(value, whole.shape)]).astype(value.dtype))

    # --- together ----------------------------------------------------------------------------------------------------

    def mark(self, where: str) -> None:
        """This rank has come to `where`: the watch over the ranks knows it is alive and where."""
        if self.watch is not None:
            self.watch.mark(where)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What happens inside ends on all ranks when it ends with an error on one."""
        with contextlib.ExitStack() as stack:
            stack.push(self._tell)
            yield

    def _tell(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        if self.watch is not None and error is not None and not isinstance(error, KeyboardInterrupt):
            self.watch.failed(error)
        return False


def _watch(world: int) -> Watch | None:
    address = launched_address(os.environ)
    if address is None:
        return None
    watch = Watch(int(os.environ.get("PADDLE_TRAINER_ID", "0")), world, address, LIMITS)
    atexit.register(watch.close)
    watch.wait_for_all()
    return watch

"""From a resolved configuration to the objects of a run: data streams, model and processor,
adapters. Each function makes one of them.

Refuses to know: the method's loss, the loop, where results go.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.source import Source, fill
from ernie_tune.config.arguments import ADDED, AddedArguments, RunConfig
from ernie_tune.config.checks import problems
from ernie_tune.config.host_memory import free_memory
from ernie_tune.config.language import say
from ernie_tune.config.loader import load_config
from ernie_tune.config.sections_run import OptimArguments
from ernie_tune.data.batching import BatchStream, Dropped, Encoder, Packable, RecordEncoder, Sample, collate
from ernie_tune.data.mixing import Mixture, Shard, permute
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import load_dataset
from ernie_tune.evaluate.measure import MeasureSettings
from ernie_tune.machine.place import Place, layout_of_run
from ernie_tune.machine.placed import Placed, read_parts
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import is_fresh, preset
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.objectives.objective import Objective
from ernie_tune.peft import settings
from ernie_tune.peft.affinity import affinity, select_experts
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PeftConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.freeze import FreezeSpec, opened
from ernie_tune.peft.model import PeftModel, get_peft_model
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.packed_header import is_packed
from ernie_tune.peft.quantize import quantize_base, takers
from ernie_tune.plan.cards import card
from ernie_tune.plan.free import check_weights
from ernie_tune.plan.job import job_of, known_shape
from ernie_tune.plan.judgement import packed_conflicts
from ernie_tune.plan.layouts import check_run
from ernie_tune.plan.room import fitting_rows
from ernie_tune.train.kept_layers import KeptLayers
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import LrRatios, Schedule, adamw_maker, build_adamw

Rows = Sequence[Record]
# Rows of the training data that expert affinity is measured on.
CALIBRATION_ROWS = 64
# Rows that are looked at for the name of a task.
TASK_ROWS = 256


def refuse(config: RunConfig) -> None:
    """ValueError, one line a mistake, for settings that cannot be trained as they are. Files have
    gone through the same judgement; a `RunConfig` made in Python has not.
    """
    found = problems(config)
    if found:
        raise ValueError("\n".join(p.message for p in found))


def warmup_steps(optim: OptimArguments, total_steps: int) -> int:
    """Steps of warm-up: those given, else the share of all steps, rounded up as transformers
    does.
    """
    return optim.warmup_steps or math.ceil(optim.warmup_ratio * total_steps)


def check_layout(config: RunConfig, model: ErnieModel | None) -> None:
    """ValueError for a layout that the model, or the one that the settings name, cannot have on the
    processes that were started.
    """
    shape = known_shape(config.model.model_name_or_path) if model is None else model.config
    if shape is not None:
        check_run(
            config.parallel,
            config.train.gradient_accumulation_steps,
            shape,
            int(os.environ.get("PADDLE_TRAINERS_NUM", "1")),
        )


def as_trained(config: RunConfig, model: ErnieModel, name: str) -> RunConfig:
    """`config` as the run really is: with the name of a model that was passed as an object, and the
    settings of the adapter on it.
    """
    method, lora, added = config.model.fine_tuning, config.lora, config.added
    adapter = model.adapters[model.active].config if isinstance(model, PeftModel) and model.active else None
    if isinstance(adapter, LoraConfig):
        method = "LoRA"
        lora = dataclasses.replace(
            lora,
            lora_rank=adapter.r,
            lora_alpha=round(adapter.alpha),
            lora_dropout=adapter.lora_dropout,
            lora_target_modules=tuple(adapter.target_modules),
            rslora=adapter.rslora,
            lora_plus_scale=adapter.lora_plus_scale,
            dora=adapter.use_dora,
        )
    elif isinstance(adapter, BottleneckConfig):
        method, added = "Adapter", dataclasses.replace(added, adapter_width=adapter.width)
    elif adapter is not None:
        width = adapter.encoder_width if isinstance(adapter, PromptConfig) else 0
        method = "Prefix" if isinstance(adapter, PrefixConfig) else "PTuning" if width else "Prompt"
        added = AddedArguments(adapter.num_virtual_tokens, width or added.prompt_encoder_width, added.adapter_width)
    about = dataclasses.replace(config.model, model_name_or_path=name, fine_tuning=method)
    return RunConfig(**{**vars(config), "model": about, "lora": lora, "added": added})


def train_sets(config: RunConfig, signals: tuple[str, ...]) -> list[Rows]:
    """The training files as lazy data sets, in the order given."""
    return _files(config, config.data.train_dataset_path, config.data.train_dataset_type, signals)


def eval_set(config: RunConfig, signals: tuple[str, ...]) -> Rows:
    """The evaluation files as one data set; empty where none are given."""
    return _Chain(_files(config, config.data.eval_dataset_path, config.data.eval_dataset_type, signals))


def _files(config: RunConfig, paths: tuple[str, ...], types: tuple[str, ...], signals: tuple[str, ...]) -> list[Rows]:
    kinds, folder = types * len(paths) if len(types) == 1 else types, config.data.dataset_dir or "."
    sets = [
        load_dataset(path, kind, dataset_dir=folder, signals=signals, seed=config.train.seed)
        for path, kind in zip(paths, kinds, strict=True)
    ]
    most = config.data.max_samples
    return [rows if most is None else rows[:most] for rows in sets]


class Subset(Sequence[Record]):
    """Some rows of a data set, read when asked for."""

    def __init__(self, rows: Rows, index: Sequence[int]) -> None:
        self.rows, self.picked = rows, index

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, i: Any) -> Any:
        return Subset(self.rows, self.picked[i]) if isinstance(i, slice) else self.rows[self.picked[i]]


def hold_out(sets: list[Rows], share: float, seed: int) -> tuple[list[Rows], Rows]:
    """Take `share` (below 1) or that many rows of all sets together away for evaluation, drawn by
    `seed`. Raises ValueError when nothing would stay.
    """
    places = [(k, i) for k, rows in enumerate(sets) for i in range(len(rows))]
    count = round(share * len(places)) if share < 1 else int(share)
    if not 0 < count < len(places):
        raise ValueError(
            say(
                f"val_size ({share:g}) must leave rows on both sides of {len(places)}; change it",
                f"val_size（{share:g}）须使 {len(places)} 行的两边都有数据；请修改",
            )
        )
    taken = {permute(j, len(places), seed, 77) for j in range(count)}
    kept = [[i for j, (k, i) in enumerate(places) if k == source and j not in taken] for source in range(len(sets))]
    held = [
        Subset(rows, [i for j, (k, i) in enumerate(places) if k == source and j in taken])
        for source, rows in enumerate(sets)
    ]
    return [Subset(rows, index) for rows, index in zip(sets, kept, strict=True)], _Chain([h for h in held if len(h)])


class _Chain(Sequence[Record]):
    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        place = range(len(self))[i]
        for part in self.parts:
            if place < len(part):
                break
            place -= len(part)
        return part[place]


def encoder_of(config: RunConfig, processor: Processor) -> Encoder:
    t = config.train
    return Encoder(
        processor, config.data.max_seq_len, config.data.truncation_strategy, t.thought_weight, t.answer_weight
    )


def measure_settings(config: RunConfig) -> MeasureSettings:
    """What is measured of a run, and what pages say of it."""
    m, d = config.model, config.data
    method = f"{m.stage} · {m.fine_tuning}"
    return MeasureSettings(
        config.eval, config.log.disable_tqdm, method, m.model_name_or_path, d.train_dataset_path, d.eval_dataset_path
    )


def data_seed(config: RunConfig) -> int:
    """What rows are drawn by."""
    t = config.train
    return t.seed if t.data_seed is None else t.data_seed


def stream_of(
    config: RunConfig, sets: Sequence[Rows], encoder: RecordEncoder, rank: int = 0, size: int = 1
) -> BatchStream:
    """The endless stream of windows of this rank."""
    d, t = config.data, config.train
    mixture = Mixture(sets, d.train_dataset_prob or None, d.mix_strategy, seed=data_seed(config))
    return BatchStream(
        Shard(mixture, rank, size),
        encoder,
        rows=t.per_device_train_batch_size,
        accumulation=t.gradient_accumulation_steps,
        packing=d.packing,
        best_fit=d.greedy_intokens,
    )


def load_processor(config: RunConfig, folder: str | Path) -> Processor:
    """The processor of a model folder, or the shipped one for presets, with the pixel limits of the
    run.
    """
    m, template = config.media, config.data.template
    limits = {"min_pixels": m.image_min_pixels, "max_pixels": m.image_max_pixels}
    if is_fresh(str(folder)) and not Path(folder).is_dir():
        given = {k: v for k, v in limits.items() if v is not None}
        name = "small" if preset(str(folder)).vocab_size >= 8192 else "tiny"
        processor = Processor.bundled(name, "hf" if template == "auto" else template, **given)
    else:
        processor = Processor.from_pretrained(folder, None if template == "auto" else template, **limits)
    return processor.with_videos(fps=m.video_fps, max_frames=m.video_max_frames, max_pixels=m.video_max_pixels)


def load_model(config: RunConfig, tell: bool = True) -> AutoModel:
    """The weights of a folder, or fresh ones for the name of a preset; bf16 becomes float32 on the
    CPU, and a line says so. `tell` False: who asks says that fresh weights are taken, if they are
    (`tell_fresh`).
    """
    model, source = _named_model(config, empty=False, tell=tell)
    fill(model, source)
    return model


def load_base(config: RunConfig, tell: bool = True) -> ErnieModel:
    """`load_model` as an adapter's base: quantised, where the settings say so, while it is read."""
    if is_packed_base(config):
        return load_packed(Path(config.model.model_name_or_path))
    algorithm = config.compute.weight_quantize_algo
    shape = known_shape(config.model.model_name_or_path)
    if shape is not None and paddle.get_device() == "cpu":
        check_weights(shape, algorithm, free_memory())
    if algorithm == "none":
        return load_model(config, tell)
    model, source = unread_model(config, tell)
    read_parts(quantize_base(model, algorithm), source)
    return model


def base_of_run(arguments: Path) -> ErnieModel:
    """`load_base` for the settings that a finished run has written. Raises ValueError where they
    name no base model.
    """
    config = load_config(arguments).config
    if not config.model.model_name_or_path:
        raise ValueError(
            say(
                f"{arguments} must name the base model of the adapter (model_name_or_path); write it "
                "there, then try again",
                f"{arguments} 须写明适配器的底座模型（model_name_or_path）；请补上后重试",
            )
        )
    return load_base(config)


def is_packed_base(config: RunConfig) -> bool:
    """Whether model_name_or_path is a folder of int8 or int4 codes. Raises ValueError for settings
    that such a base cannot follow.
    """
    if not is_packed(Path(config.model.model_name_or_path)):
        return False
    if problems := [message for _, message in packed_conflicts(config)]:
        raise ValueError("\n".join(problems))
    return True


def unread_model(config: RunConfig, tell: bool = True) -> tuple[ErnieModel, Source]:
    """`load_model` for a rank that keeps a part: a model without values, and what they are read
    from once it lies over the ranks.
    """
    return _named_model(config, empty=True, tell=tell)


def model_for(config: RunConfig, place: Place) -> tuple[ErnieModel, Source | None]:
    """The model that the settings name. It comes without values, which are read from what is given
    beside it when it is put, where it would not fit before: as one of several processes, or when a
    quantised base is to be made of it.
    """
    if is_packed_base(config):
        return load_base(config), None
    if place.several or config.compute.weight_quantize_algo != "none":
        return unread_model(config, tell=False)
    return load_model(config, tell=False), None


def measured(config: RunConfig, place: Place, samples: Sequence[Any], source: Source | None) -> Any:
    """What expert affinity is measured on before the model gets its adapters, and with them its
    layout: a copy of it that lies over the ranks, for the time of measuring. None where there is
    nothing to measure, or the model has its values.
    """
    if not samples or source is None:
        return None
    if not place.several:
        return load_base(config, tell=False)
    model, source = unread_model(config, tell=False)
    if config.compute.weight_quantize_algo != "none":
        quantize_base(model, config.compute.weight_quantize_algo)
    return place.put(model, source, trained=False).forward


def _draws(config: RunConfig) -> bool:
    name = config.model.model_name_or_path
    return not Path(name).is_dir() and is_fresh(name)


def tell_fresh(config: RunConfig) -> None:
    """Say that the model's weights are drawn, where they are."""
    name, seed = config.model.model_name_or_path, config.train.seed
    if _draws(config):
        print(
            say(
                f"ernie_tune: {name}: fresh weights drawn from seed {seed}",
                f"ernie_tune：{name}：权重由种子 {seed} 随机初始化",
            ),
            file=sys.stderr,
        )


def _named_model(config: RunConfig, empty: bool, tell: bool) -> tuple[AutoModel, Source]:
    name, c = config.model.model_name_or_path, config.compute
    dtype = "float64" if c.float64 else None
    model: AutoModel
    source: Source
    if _draws(config):
        model, source = AutoModel.undrawn(name, config.train.seed, dtype, empty)
        if tell:
            tell_fresh(config)
    else:
        hub = config.model.download_hub
        model, source = AutoModel.unread(name, dtype, None if hub == "none" else hub, empty=empty)
    if c.bf16 and model.compute_dtype == "float32":
        print(
            say(
                "ernie_tune: bf16: true: this device computes in float32 instead",
                "ernie_tune：bf16: true：此设备改用 float32 计算",
            ),
            file=sys.stderr,
        )
    return model, source


def apply_method(
    config: RunConfig,
    model: ErnieModel,
    calibration: Sequence[Sample] = (),
    source: Source | None = None,
    measured: Any = None,
) -> ErnieModel:
    """LoRA, added layers, freezing or full fine-tuning as configured, on a plain model.
    `calibration`: samples for expert affinity. Of a model without values yet: `source`, what they
    are read from; `measured`, one like it that can be run.
    """
    f, m = config.freeze, config.model
    if config.compute.weight_quantize_algo != "none":
        quantize_base(model, config.compute.weight_quantize_algo)
    if m.fine_tuning == "LoRA":
        if config.lora.lora_path:
            return PeftModel.from_pretrained(model, config.lora.lora_path)
        return get_peft_model(model, lora_config(config, measured or model, calibration))
    if m.fine_tuning in ADDED:
        # which start from rows of the table
        if source is not None and m.fine_tuning in ("Prompt", "PTuning"):
            fill(model, source, stages=("embed_tokens",), takers=takers(model))
        return get_peft_model(model, added_config(config))
    spec = FreezeSpec(f.trainable_layers, f.frozen_layers, f.freeze_config)
    if f.freeze_spec:
        given = FreezeSpec.from_json(f.freeze_spec)
        spec = FreezeSpec(given.trainable, given.frozen, f.freeze_config)
    spec.apply(model)
    return model


def loop_of(
    config: RunConfig, policy: Placed, objective: Objective, total_steps: int, learning_rate: float | None = None
) -> Loop:
    """The loop of a run of so many steps, with an AdamW that has made none. `learning_rate`: the
    peak, where it is not the settings'."""
    o, t, model = config.optim, config.train, policy.model
    peak = o.learning_rate if learning_rate is None else learning_rate
    schedule = Schedule(peak, total_steps, warmup_steps(o, total_steps), o.lr_scheduler_type, o.min_lr)
    ratios = LrRatios(o.moe_gate_lr_ratio, o.vit_lr_ratio)

    def rate(name: str) -> float:
        return ratios.of(name) * (model.learning_rate_scale(name) if isinstance(model, PeftModel) else 1.0)

    named = list(model.named_parameters())
    betas = {"beta1": o.adam_beta1, "beta2": o.adam_beta2, "epsilon": o.adam_epsilon}
    if policy.place.several:
        optimizer = policy.optimizer(adamw_maker(named, rate, weight_decay=o.weight_decay, **betas))
    else:
        optimizer = build_adamw(named, rate, weight_decay=o.weight_decay, **betas)
    weights = RouterLossWeights(t.router_aux_loss_coef, t.moe_orthogonal_loss_lambda, t.router_z_loss_coef)
    settings = LoopSettings(
        max_grad_norm=o.max_grad_norm,
        router=weights if weights != RouterLossWeights() else None,
        recompute=_recompute_of(config, policy) if config.compute.recompute else None,
        seed=t.seed,
        bias_update=t.moe_use_aux_free_update_coef,
    )
    policy.moves_router_bias = _router_bias_moves(settings.bias_update, model)
    return Loop(model, objective, optimizer, schedule, settings, policy.engine)


def _router_bias_moves(coefficient: float, model: ErnieModel) -> bool:
    """Whether the loop moves a router's bias. Raises ValueError where none would follow."""
    trained = any(".mlp.gate." in name and not p.stop_gradient for name, p in model.named_parameters())
    if coefficient and not trained:
        raise ValueError(
            say(
                f"moe_use_aux_free_update_coef ({coefficient:g}) must be 0 for a model without trained "
                "routers; set 0, or leave freeze_router out of freeze_config",
                f"没有可训练路由的模型 moe_use_aux_free_update_coef（{coefficient:g}）须为 0；请设为 0，"
                "或从 freeze_config 中去掉 freeze_router",
            )
        )
    return coefficient > 0


def recompute() -> Any:
    """What runs a block again in its backward instead of keeping its activations."""
    from paddle.distributed.fleet.utils import recompute

    return opened(recompute)


def _recompute_of(config: RunConfig, policy: Placed) -> Any:
    """`recompute`, or, on a quantised base and one CPU process, of what does not fit alone."""
    name, algorithm = config.model.model_name_or_path, config.compute.weight_quantize_algo
    coded = algorithm != "none" or is_packed(Path(name))
    if policy.place.several or not coded or paddle.get_device() != "cpu":
        return recompute()
    return KeptLayers(recompute(), job_of(config, policy.model.config, on_cpu=True), free_memory)


def dealt(config: RunConfig, model: ErnieModel | None) -> RunConfig:
    """`config` with the rows of a step in micro-batches as large as memory allows, where
    auto_find_batch_size asks for it; a line says what was chosen.
    """
    t = config.train
    shape = known_shape(config.model.model_name_or_path) if model is None else model.config
    if not t.auto_find_batch_size or shape is None:
        return config
    world = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
    on_cpu = paddle.get_device() == "cpu"
    if on_cpu:
        free = free_memory()
        room = free.bytes / world if free else 0.0
    else:
        room = float(paddle.device.cuda.get_device_properties().total_memory)
    job = job_of(config, shape, on_cpu=on_cpu)
    rows = fitting_rows(job, room, layout_of_run(config.parallel, world), card("cpu" if on_cpu else "80g"))
    steps = t.per_device_train_batch_size * t.gradient_accumulation_steps // rows
    print(
        say(
            f"ernie_tune: auto_find_batch_size: {steps} micro-batch(es) of {rows} row(s) a step, for {room / 1e9:.1f} GB",
            f"ernie_tune：auto_find_batch_size：每步 {steps} 个微批，每个 {rows} 行（可用 {room / 1e9:.1f} GB）",
        ),
        file=sys.stderr,
    )
    chosen = dataclasses.replace(t, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    return RunConfig(**{**vars(config), "train": chosen})


def added_config(config: RunConfig) -> PeftConfig:
    """The settings of bottleneck adapters, a prompt or a prefix."""
    a, seed = config.added, config.train.seed
    if config.model.fine_tuning == "Adapter":
        return BottleneckConfig(a.adapter_width, seed=seed)
    if config.model.fine_tuning == "Prefix":
        return PrefixConfig(a.num_virtual_tokens, seed=seed)
    width = a.prompt_encoder_width if config.model.fine_tuning == "PTuning" else 0
    return PromptConfig(a.num_virtual_tokens, width, seed=seed)


def lora_config(config: RunConfig, model: Any, calibration: Sequence[Sample]) -> LoraConfig:
    """The LoRA settings of a run; `lora_expert_affinity` is measured here, on the calibration
    samples.
    """
    c = config.lora
    given = (c, config.freeze.freeze_config, config.model.model_name_or_path, config.train.seed)
    if c.lora_expert_list or c.lora_expert_affinity <= 0:
        return settings.lora_config(*given)
    tokens = model.config.tokens
    table = affinity(model, [collate([s], tokens).inputs for s in calibration])
    modalities = ("text", "vision") if c.lora_experts in ("none", "both") else (c.lora_experts,)
    picked = [e for e in select_experts(table, c.lora_expert_affinity) if e[1] in modalities]
    return settings.lora_config(*given, picked)


ALIKE = 0.95  # of the heaviest: the first step needs as much


def longest(stream: BatchStream, scan_rows: int = 256) -> tuple[list[Packable], bool]:
    """The heaviest micro-batch that the first `scan_rows` rows can make: the longest rows (tokens
    plus patches), or a full pack; and whether it stands out, the lightest being smaller. For
    provoking out-of-memory before the first step. Reads rows by position, so the stream stays where
    it is.
    """
    mixture = stream.shard.mixture
    dropped = Dropped()
    found = [stream.encoder(mixture[i], dropped) for i in range(min(scan_rows, len(mixture)))]
    samples = sorted((s for s in found if s is not None), key=_weight, reverse=True)
    if not stream.packing:
        heavy, light = (sum(map(_weight, part)) for part in (samples[: stream.rows], samples[-stream.rows :]))
        return samples[: stream.rows], light < ALIKE * heavy
    room, chosen = stream.rows * stream.encoder.max_tokens, []
    for s in samples:
        if s.num_tokens <= room:
            chosen.append(s)
            room -= s.num_tokens
    return chosen, True


def _weight(sample: Packable) -> int:
    return sample.num_tokens + sample.num_patches

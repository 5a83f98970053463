"""The one judgement of settings: which fit together, which this version cannot honour, which have no effect. A rule yields the setting to point at, and
what is wrong in English and 中文. Pure: every verb and every trainer asks the same.

Refuses to know: where settings were written, how to convert them, whether paths exist (plan/judgement.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.convert import did_you_mean, to_yaml
from ernie_tune.config.sections_model import TEMPLATES
from ernie_tune.config.stages import EDGE_LOSSES, ONLINE_PRESETS, PAIR_LOSSES, STAGES, UNREFERENCED, UPO_TERMS


class Problem(NamedTuple):
    """`setting`: the one to point at. `unbuilt`: right in itself, but this version cannot train it; who only counts or looks may go on."""

    setting: str
    message: str
    unbuilt: bool = False


def problems(c: RunConfig) -> list[Problem]:
    """Why the settings of `c` cannot be trained as they are; empty if they can."""
    rules = (
        _data,
        _mixing,
        _training,
        _weights,
        _saving,
        _best,
        _parallel,
        _stage,
        _compared,
        _density,
        _reference,
        _losses,
    )
    wrong = [Problem(*p) for rule in rules for p in rule(c)]
    return wrong + [Problem(name, message, unbuilt=True) for name, message in _unbuilt(c)]


def remarks(c: RunConfig, given: Collection[str]) -> list[tuple[str, str]]:
    """What to say of settings that somebody wrote and that have no effect: (setting, line)."""
    flat = c.flat()
    found = []
    for name in given:
        setting = SETTINGS[name]
        if not c.reads(name) and not (c.applies(setting.section) and flat[name] == setting.default):
            found.append((name, f"{name} has no effect with {_unread_at(c, name)} / 该设置无效"))
        elif setting.about.unread and flat[name] != setting.default:
            found.append((name, f"{name} ({to_yaml(flat[name])}) has no effect: {setting.about.unread} / 该设置无效"))
    found += [(name, line) for name, line in _idle(c) if name in given]
    return found


def _unread_at(c: RunConfig, name: str) -> str:
    about = SETTINGS[name].about
    if about.methods and c.model.fine_tuning not in about.methods:
        return f"fine_tuning {c.model.fine_tuning}"
    return f"stage {c.model.stage}"


def _idle(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that others switch off."""
    e, s, o, p = c.eval, c.save, c.optim, c.parallel
    if c.data.greedy_intokens and not c.data.packing:
        yield "greedy_intokens", "greedy_intokens has no effect without packing; set packing: true / 需要 packing"
    if p.pp_seg_method and p.pipeline_model_parallel_size == 1:
        yield "pp_seg_method", "pp_seg_method has no effect with pipeline_model_parallel_size 1 / 需要流水并行"
    if e.eval_strategy != "steps" and e.eval_steps:
        yield (
            "eval_steps",
            f"eval_steps has no effect with eval_strategy {e.eval_strategy}; set eval_strategy: steps / 未按步评估",
        )
    if s.save_strategy != "steps" and s.save_steps:
        yield "save_steps", f"save_steps has no effect with save_strategy {s.save_strategy} / 未按步保存"
    for name in ("warmup_ratio", "warmup_steps"):
        if o.lr_scheduler_type == "constant" and c.flat()[name]:
            yield (
                name,
                f"{name} has no effect with lr_scheduler_type constant; set constant_with_warmup / constant 不预热",
            )


def missing(c: RunConfig) -> list[Problem]:
    """What a run from a file must name, and a call from Python passes as objects: the model and the rows."""
    return [Problem(*p) for p in _missing(c)]


def _missing(c: RunConfig) -> Iterator[tuple[str, str]]:
    held_out = bool(c.data.eval_dataset_path) or c.data.val_size > 0
    if not c.model.model_name_or_path:
        yield "model_name_or_path", "model_name_or_path is missing; name a folder, hub model or preset / 缺少模型"
    if not c.data.train_dataset_path:
        yield "train_dataset_path", "train_dataset_path is missing; name a data file / 缺少训练数据"
    for name, wanted in (("eval_strategy", c.eval.eval_strategy != "no"), ("do_eval", c.eval.do_eval)):
        if wanted and not held_out:
            yield (
                name,
                f"{name} ({str(c.flat()[name]).lower()}) needs rows to evaluate; set eval_dataset_path or val_size / 缺少评估数据",
            )


def _data(c: RunConfig) -> Iterator[tuple[str, str]]:
    low, high = c.media.image_min_pixels, c.media.image_max_pixels
    for side in ("train", "eval"):
        files, kinds = (len(c.flat()[f"{side}_dataset_{what}"]) for what in ("path", "type"))
        if files and kinds not in (1, files):
            yield (
                f"{side}_dataset_type",
                f"{side}_dataset_type ({kinds} values) must have one value or one a file ({files}); or set auto / 类型个数不符",
            )
    if c.data.template not in TEMPLATES:
        yield (
            "template",
            f"template ({c.data.template}) must be one of {', '.join(TEMPLATES)}{did_you_mean(c.data.template, TEMPLATES)}; set auto for the model's own / 模板未知，请设为 auto",
        )
    if low is not None and high is not None and low > high:
        yield (
            "image_min_pixels",
            f"image_min_pixels ({low}) must not exceed image_max_pixels ({high}); lower it / 下限大于上限",
        )


def _mixing(c: RunConfig) -> Iterator[tuple[str, str]]:
    files, weights = len(c.data.train_dataset_path), len(c.data.train_dataset_prob)
    name = f"train_dataset_prob ({weights} values)"
    if files and weights not in (0, files):
        yield (
            "train_dataset_prob",
            f"{name} must have one value a file of train_dataset_path ({files}); match them / 权重个数须等于文件个数",
        )
    if weights and min(c.data.train_dataset_prob) <= 0:
        yield "train_dataset_prob", f"{name} must all be above 0; drop files that you do not want / 权重须大于 0"
    if weights > 1 and c.data.mix_strategy == "concat":
        yield (
            "mix_strategy",
            f"mix_strategy (concat) cannot follow {name}; set mix_strategy: random / concat 不使用权重",
        )


def _training(c: RunConfig) -> Iterator[tuple[str, str]]:
    t, o = c.train, c.optim
    if t.max_steps == 0:
        yield "max_steps", "max_steps (0) must be above 0, or -1 to let num_train_epochs decide; set one / 步数为 0"
    if t.max_steps == -1 and t.num_train_epochs == 0:
        yield (
            "num_train_epochs",
            "num_train_epochs (0) must be above 0 when max_steps is -1; set one of them / 训练长度为 0",
        )
    if o.warmup_steps > 0 and o.warmup_ratio > 0:
        yield (
            "warmup_ratio",
            f"warmup_ratio ({o.warmup_ratio}) and warmup_steps ({o.warmup_steps}) must not both be set; keep one / 预热重复",
        )
    if 0 < t.max_steps < o.warmup_steps:
        yield (
            "warmup_steps",
            f"warmup_steps ({o.warmup_steps}) must not exceed max_steps ({t.max_steps}); lower it / 预热超过总步数",
        )
    if o.lr_scheduler_type.startswith("constant") and o.min_lr:
        yield (
            "min_lr",
            f"min_lr ({o.min_lr}) must be 0 with lr_scheduler_type {o.lr_scheduler_type}, which never falls; remove it / 该曲线不下降",
        )
    if o.min_lr > o.learning_rate:
        yield (
            "min_lr",
            f"min_lr ({o.min_lr}) must not exceed learning_rate ({o.learning_rate}); lower it / 最小学习率过大",
        )


def _weights(c: RunConfig) -> Iterator[tuple[str, str]]:
    x, f = c.compute, c.freeze
    if x.float64 and (x.bf16 or x.fp16):
        yield (
            "float64",
            "float64 (true) must not go with bf16 or fp16 (true); keep one / float64 不能与 bf16、fp16 同用",
        )
    if x.float64 and c.model.stage == "RM":
        yield (
            "float64",
            "float64 (true) must be false at stage RM, whose head is float32; unset it / RM 阶段不支持 float64",
        )
    if x.bf16 and x.fp16:
        yield "fp16", "fp16 (true) and bf16 (true) must not both be set; keep one / bf16 与 fp16 只能选一"
    if c.lora.lora_alpha == 0:
        yield (
            "lora_alpha",
            "lora_alpha (0) must be above 0, or -1 for the default; 0 switches the adapter off / 缩放为 0",
        )
    if c.model.fine_tuning in ("Full", "Freeze") and x.weight_quantize_algo != "none":
        yield (
            "weight_quantize_algo",
            f"weight_quantize_algo ({x.weight_quantize_algo}) must go with adapters (fine_tuning LoRA), not {c.model.fine_tuning}; change one / 量化权重不可训练",
        )
    if c.model.fine_tuning == "Freeze" and not any(vars(f).values()):
        yield (
            "fine_tuning",
            "fine_tuning (Freeze) must come with trainable_layers, frozen_layers, freeze_spec or freeze_config; set one, or fine_tuning: Full / 未指定层",
        )
    if f.freeze_spec and (f.trainable_layers or f.frozen_layers):
        yield (
            "freeze_spec",
            f"freeze_spec ({f.freeze_spec}) must not go with trainable_layers or frozen_layers; keep one / 冻结设置重复",
        )


def _saving(c: RunConfig) -> Iterator[tuple[str, str]]:
    e, s = c.eval, c.save
    if e.eval_strategy == "steps" and e.eval_steps == 0:
        yield "eval_strategy", "eval_strategy (steps) needs eval_steps (0) above 0; set eval_steps / 缺少 eval_steps"
    if s.save_strategy == "steps" and s.save_steps == 0:
        yield "save_steps", "save_steps (0) must be above 0 when save_strategy is steps; raise it / 步数为 0"
    if e.early_stopping_patience > 0 and e.eval_strategy == "no":
        yield (
            "early_stopping_patience",
            f"early_stopping_patience ({e.early_stopping_patience}) counts evaluations; set eval_strategy / 早停需要评估",
        )

    if e.guard_dataset_path and e.eval_strategy == "no":
        yield (
            "guard_dataset_path",
            "guard_dataset_path is looked at when evaluating and must go with eval_strategy steps or epoch, not no; set eval_strategy / 需要评估",
        )


def _best(c: RunConfig) -> Iterator[tuple[str, str]]:
    e, s = c.eval, c.save
    if not e.load_best_model_at_end:
        return
    if e.eval_strategy == "no" or s.save_strategy != e.eval_strategy:
        yield (
            "load_best_model_at_end",
            f"load_best_model_at_end (true) needs save_strategy ({s.save_strategy}) and eval_strategy ({e.eval_strategy}) alike and not no; "
            "set both / 保存与评估策略须一致",
        )
    elif e.eval_strategy == "steps" and e.eval_steps > 0 and s.save_steps % e.eval_steps:
        yield (
            "save_steps",
            f"save_steps ({s.save_steps}) must be a multiple of eval_steps ({e.eval_steps}); change one / 须为 eval_steps 的倍数",
        )


def _parallel(c: RunConfig) -> Iterator[tuple[str, str]]:
    p, virtual = c.parallel, "virtual_pipeline_model_parallel_size"
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel",
            "sequence_parallel (true) needs tensor_model_parallel_size (1) above 1; raise it / 需要张量并行",
        )
    if p.expert_model_parallel_size > 1 and p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        yield (
            "sequence_parallel",
            f"sequence_parallel (false) must be true with expert_model_parallel_size ({p.expert_model_parallel_size}) and "
            f"tensor_model_parallel_size ({p.tensor_model_parallel_size}), else every tensor rank sends the same tokens; set it / 须开启",
        )
    if p.virtual_pipeline_model_parallel_size > 1 and p.pipeline_model_parallel_size == 1:
        yield (
            virtual,
            f"{virtual} ({p.virtual_pipeline_model_parallel_size}) needs pipeline_model_parallel_size (1) above 1; raise it / 需要流水并行",
        )
    if p.sharding == "off" and p.sharding_parallel_size > 1:
        yield (
            "sharding_parallel_size",
            f"sharding_parallel_size ({p.sharding_parallel_size}) must be 1 while sharding is off; set sharding: stage1 / 未开启",
        )


def _stage(c: RunConfig) -> Iterator[tuple[str, str]]:
    weights, rewards = len(c.rollout.reward_weights), len(c.rollout.reward_funcs)
    prompt, longest = c.preference.max_prompt_len, c.data.max_seq_len
    if c.applies("preference") and prompt >= longest and prompt != SETTINGS["max_prompt_len"].default:
        yield "max_prompt_len", f"max_prompt_len ({prompt}) must be below max_seq_len ({longest}); lower it / 提示过长"
    yield from _kto_rows(c)
    if c.applies("rollout") and c.data.packing:
        yield (
            "packing",
            f"packing (true) must be false at stage {c.model.stage}, where answers are sampled; unset it / 该阶段不支持 packing",
        )
    if c.applies("rollout") and weights not in (0, rewards):
        yield (
            "reward_weights",
            f"reward_weights ({weights} values) must have one value a reward ({rewards}); match them / 权重个数须等于奖励个数",
        )


def _kto_rows(c: RunConfig) -> Iterator[tuple[str, str]]:
    """KTO's baseline compares the answers of a step with one another's prompts (2402.01306): one row alone has no other."""
    t, name = c.train, "per_device_train_batch_size"
    learned = c.preference.loss_type[0] in ("auto", "kto")
    rows = t.per_device_train_batch_size * t.gradient_accumulation_steps * c.parallel.sharding_parallel_size
    if c.model.stage == "KTO" and learned and rows < 2:
        yield (
            name,
            f"{name} ({t.per_device_train_batch_size}) must be at least 2 at stage KTO, whose baseline compares the answers of a step with one another; "
            "raise it or gradient_accumulation_steps, or set loss_type: apo_zero_unpaired / KTO 每步至少两行",
        )
    if (
        c.model.fine_tuning in ("Prompt", "PTuning", "Prefix")
        and STAGES[c.model.stage].compares
        and c.preference.prefix_sharing
    ):
        yield (
            "prefix_sharing",
            f"prefix_sharing (true) must be false with fine_tuning {c.model.fine_tuning}: virtual tokens begin every dialogue; set it / 虚拟 token 不能共享",
        )


def _unbuilt(c: RunConfig) -> Iterator[tuple[str, str]]:
    """What may be written, but not trained yet: refused, since leaving it out would change the result."""
    flat = c.flat()
    if not STAGES[c.model.stage].built:
        built = ", ".join(name for name, stage in STAGES.items() if stage.built)
        yield (
            "stage",
            f"stage ({c.model.stage}) cannot be trained in this version, it must be one of {built}; change it / 该阶段尚不支持",
        )
    for name, setting in SETTINGS.items():
        if setting.about.unbuilt and flat[name] != setting.default and c.reads(name):
            yield (
                name,
                f"{name} ({to_yaml(flat[name])}) has no effect in this version, must be left at {to_yaml(setting.default)}; {setting.about.unbuilt} / 尚不支持",
            )
    if c.parallel.sharding.endswith("offload"):
        stage = c.parallel.sharding.split()[0]
        yield (
            "sharding",
            f"sharding ({c.parallel.sharding}) must be without offload in this version; set {stage} / 尚不支持 offload",
        )


def _losses(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Names in `loss_type` and `edge_loss` (`objectives` computes them), and the reference that they need."""
    stage, names = STAGES[c.model.stage], c.preference.loss_type
    if not stage.compares:
        return
    several = stage.name == "DPO"
    known = stage.losses if several or len(names) == 1 else ()
    if names != ("auto",):
        for name in names if known else (",".join(names),):
            yield from _loss_name(stage.name, name, stage.losses)
    referenced = {name not in UNREFERENCED for name in names if name in PAIR_LOSSES and name != "sft"}
    shown = ",".join(names)
    if several and len(referenced) > 1:
        yield (
            "loss_type",
            f"loss_type ({shown}) must not mix losses with and without a reference; split the run or drop one / 不能混用有参考与无参考的损失",
        )
    elif several and referenced != {False} and names != ("sft",):
        if c.reference.reference_free:
            yield (
                "reference_free",
                f"reference_free (true) must go with losses without a reference, not loss_type {shown}; take simpo, orpo or cpo / 该损失需要参考",
            )
        if c.reference.ref_mode == "none":
            yield (
                "ref_mode",
                f"ref_mode (none) must not go with loss_type {shown}, which compares with a reference; set auto, or take simpo, orpo or cpo / 该损失需要参考",
            )
    if stage.name == "KTO" and c.reference.ref_mode == "none":
        yield (
            "ref_mode",
            "ref_mode (none) must be another at stage KTO, whose losses compare with a reference; set auto / 该阶段需要参考",
        )
    if stage.name == "UPO":
        yield from _loss_name("UPO", c.signals.edge_loss, EDGE_LOSSES, "edge_loss")
        yield from _term_weights(c)


def _term_weights(c: RunConfig) -> Iterator[tuple[str, str]]:
    for item in c.signals.term_weights:
        term, _, number = item.partition("=")
        if term.strip() not in UPO_TERMS or not re.fullmatch(r"\s*\d*\.?\d+(e[+-]?\d+)?\s*", number):
            yield (
                "term_weights",
                f"term_weights ({item!r}) must look like term=weight, term one of {', '.join(UPO_TERMS)}; e.g. pair=1,rank=0.5 / 格式为 项=权重",
            )


def _loss_name(stage: str, name: str, known: tuple[str, ...], setting: str = "loss_type") -> Iterator[tuple[str, str]]:
    if name in known:
        return
    if name in ONLINE_PRESETS and stage == "UPO":
        yield (
            setting,
            f"{setting} ({name}) samples answers while it learns, which this version does not, and must be one of {', '.join(known)}; take upo_hetero / 该目标需要采样",
        )
    elif name == "kto_pair":
        yield (
            setting,
            f"{setting} (kto_pair) must be another: it compares with means of the whole batch; take stage KTO on labels, or bco_pair / 请改用其他损失",
        )
    elif not known:
        yield setting, f"{setting} ({name}) must be auto at stage {stage}; remove it / 该阶段不选损失"
    else:
        yield (
            setting,
            f"{setting} ({name}) must be one of {', '.join(known)} at stage {stage}{did_you_mean(name, known)}; correct the name / 损失名称未知",
        )


def _compared(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of comparisons that this stage, its loss or another setting does not read."""
    if not STAGES[c.model.stage].compares:
        return
    flat, p = c.flat(), c.preference
    at_upo = c.model.stage == "UPO"
    compared = ("edge_loss", (c.signals.edge_loss,)) if at_upo else ("loss_type", p.loss_type)
    for name, setting in SETTINGS.items():
        about = setting.about
        if flat[name] == setting.default or not any(STAGES[stage].compares for stage in about.stages):
            continue
        if c.model.stage not in about.stages:
            yield (
                name,
                f"{name} ({flat[name]}) has no effect at stage {c.model.stage}, only at {', '.join(about.stages)}; remove it / 该阶段无效",
            )
        elif about.losses and not set(about.losses) & set(compared[1]):
            yield (
                name,
                f"{name} ({flat[name]}) must go with {compared[0]} {' or '.join(about.losses)}, not {','.join(compared[1])}; set one / 该损失不使用此项",
            )
        elif about.needs and flat[about.needs[0]] not in about.needs[1]:
            other, values = about.needs
            yield (
                name,
                f"{name} ({flat[name]}) must go with {other} {' or '.join(values)}, not {flat[other]}; set one / 需要 {other}",
            )
    if p.loss_weights and len(p.loss_weights) != len(p.loss_type):
        yield (
            "loss_weights",
            f"loss_weights ({len(p.loss_weights)} values) must have one value a loss_type ({len(p.loss_type)}); match them / 权重个数须等于损失个数",
        )
    if "exo_pair" in compared[1] and not p.label_smoothing:
        yield (
            compared[0],
            f"{compared[0]} (exo_pair) needs label_smoothing above 0: its target is (1 - eps, eps); set 0.001 / 需要 label_smoothing",
        )
    if p.offset_type != "linear" and not p.offset_alpha:
        yield (
            "offset_type",
            f"offset_type ({p.offset_type}) must go with offset_alpha above 0; set it / 需要 offset_alpha",
        )
    if c.lora.lora_dropout:
        yield (
            "lora_dropout",
            f"lora_dropout ({c.lora.lora_dropout:g}) must be 0 at stage {c.model.stage}: answers are compared without dropout; remove it / 该阶段不用 dropout",
        )


def _density(c: RunConfig) -> Iterator[tuple[str, str]]:
    s, flat = c.signals, c.flat()
    if c.model.stage not in ("KTO", "UPO"):
        return
    learned = ("bin_loss", s.bin_loss) if c.model.stage == "UPO" else ("loss_type", ",".join(c.preference.loss_type))
    if s.bco_density and learned[1] != "bco":
        yield (
            "bco_density",
            f"bco_density (true) must go with {learned[0]} bco, not {learned[1]}; set one / 仅 bco 使用此项",
        )
    for name in ("bco_density_min", "bco_density_max"):
        if not s.bco_density and flat[name] != SETTINGS[name].default:
            yield name, f"{name} ({flat[name]:g}) must go with bco_density: true; set it / 需要 bco_density"
    if s.bco_density_min > s.bco_density_max:
        yield (
            "bco_density_min",
            f"bco_density_min ({s.bco_density_min:g}) must not exceed bco_density_max ({s.bco_density_max:g}); lower it / 下限大于上限",
        )


def _reference(c: RunConfig) -> Iterator[tuple[str, str]]:
    p, m = c.reference, c.model
    if not (STAGES[m.stage].compares and STAGES[m.stage].reference):
        return
    if p.ref_logps_path and p.ref_mode != "precomputed":
        yield (
            "ref_logps_path",
            f"ref_logps_path ({p.ref_logps_path}) must go with ref_mode precomputed, not {p.ref_mode}; set it / 需要 ref_mode: precomputed",
        )
    if p.reference_free and p.ref_mode not in ("auto", "none"):
        yield (
            "reference_free",
            f"reference_free (true) must go with ref_mode none, not {p.ref_mode}; keep one / 参考设置矛盾",
        )
    if p.ref_mode.startswith("adapter") and m.fine_tuning in ("Full", "Freeze"):
        yield (
            "ref_mode",
            f"ref_mode ({p.ref_mode}) must go with adapters, not fine_tuning {m.fine_tuning}; set model or precomputed / 需要适配器",
        )
    if p.ref_mode == "model" and m.fine_tuning not in ("Full", "Freeze"):
        yield (
            "ref_mode",
            f"ref_mode (model) must go with a model that is trained itself, not fine_tuning {m.fine_tuning}; set adapter_off or adapter_ref / 适配器的参考请用 adapter_off",
        )
    if p.ref_mode == "precomputed" and m.stage == "KTO" and c.preference.loss_type[0] in ("auto", "kto"):
        yield (
            "ref_mode",
            "ref_mode (precomputed) must not go with kto, whose mismatched answers are not known before; set auto, or loss_type bco or apo_zero_unpaired / kto 不能预先计算参考",
        )
    moving = p.ref_model_update_steps > 0
    if moving and p.ref_mode in ("adapter_off", "precomputed", "none"):
        yield (
            "ref_model_update_steps",
            f"ref_model_update_steps ({p.ref_model_update_steps}) must go with a reference that has weights of its own, not ref_mode {p.ref_mode}; "
            "set model or adapter_ref / 该参考不可更新",
        )
    if not moving and p.ref_model_mixup_alpha != SETTINGS["ref_model_mixup_alpha"].default:
        yield (
            "ref_model_mixup_alpha",
            f"ref_model_mixup_alpha ({p.ref_model_mixup_alpha}) must go with ref_model_update_steps above 0; set it / 需要 ref_model_update_steps",
        )

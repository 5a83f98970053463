"""Which settings fit together. A rule yields the setting to point at, and what is wrong in English and 中文.

Refuses to know: where settings were written, how to convert them, whether paths exist.
"""

from __future__ import annotations

from collections.abc import Iterator

from ernie_tune.config.arguments import SETTINGS, RunConfig

Problem = tuple[str, str]  # (the setting to point at, message)


def problems(c: RunConfig) -> list[Problem]:
    """Contradictions between the settings of `c`; empty if there are none."""
    return [
        p
        for rule in (
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
        )
        for p in rule(c)
    ]


def missing(c: RunConfig) -> list[Problem]:
    """What a run from a file must name, and a call from Python passes as objects: the model and the rows."""
    return list(_missing(c))


def _missing(c: RunConfig) -> Iterator[Problem]:
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


def _data(c: RunConfig) -> Iterator[Problem]:
    low, high = c.media.image_min_pixels, c.media.image_max_pixels
    for side in ("train", "eval"):
        files, kinds = (len(c.flat()[f"{side}_dataset_{what}"]) for what in ("path", "type"))
        if files and kinds not in (1, files):
            yield (
                f"{side}_dataset_type",
                f"{side}_dataset_type ({kinds} values) must have one value or one a file ({files}); or set auto / 类型个数不符",
            )
    if c.data.greedy_intokens and not c.data.packing:
        yield "greedy_intokens", "greedy_intokens (true) is a way of packing; set packing: true / 需要 packing"
    if low is not None and high is not None and low > high:
        yield (
            "image_min_pixels",
            f"image_min_pixels ({low}) must not exceed image_max_pixels ({high}); lower it / 下限大于上限",
        )


def _mixing(c: RunConfig) -> Iterator[Problem]:
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


def _training(c: RunConfig) -> Iterator[Problem]:
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
    if o.min_lr > o.learning_rate:
        yield (
            "min_lr",
            f"min_lr ({o.min_lr}) must not exceed learning_rate ({o.learning_rate}); lower it / 最小学习率过大",
        )


def _weights(c: RunConfig) -> Iterator[Problem]:
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
    if f.freeze_spec and (f.trainable_layers or f.frozen_layers):
        yield (
            "freeze_spec",
            f"freeze_spec ({f.freeze_spec}) must not go with trainable_layers or frozen_layers; keep one / 冻结设置重复",
        )


def _saving(c: RunConfig) -> Iterator[Problem]:
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


def _best(c: RunConfig) -> Iterator[Problem]:
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


def _parallel(c: RunConfig) -> Iterator[Problem]:
    p, virtual = c.parallel, "virtual_pipeline_model_parallel_size"
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel",
            "sequence_parallel (true) needs tensor_model_parallel_size (1) above 1; raise it / 需要张量并行",
        )
    if p.virtual_pipeline_model_parallel_size > 1 and p.pipeline_model_parallel_size == 1:
        yield (
            virtual,
            f"{virtual} ({p.virtual_pipeline_model_parallel_size}) needs pipeline_model_parallel_size (1) above 1; raise it / 需要流水并行",
        )
    if p.pp_seg_method and p.pipeline_model_parallel_size == 1:
        yield (
            "pp_seg_method",
            f"pp_seg_method ({','.join(p.pp_seg_method)}) needs pipeline_model_parallel_size (1) above 1; raise it / 需要流水并行",
        )
    if p.sharding == "off" and p.sharding_parallel_size > 1:
        yield (
            "sharding_parallel_size",
            f"sharding_parallel_size ({p.sharding_parallel_size}) must be 1 while sharding is off; set sharding: stage1 / 未开启",
        )


def _stage(c: RunConfig) -> Iterator[Problem]:
    weights, rewards = len(c.rollout.reward_weights), len(c.rollout.reward_funcs)
    prompt, longest = c.preference.max_prompt_len, c.data.max_seq_len
    if c.applies("preference") and prompt >= longest:
        yield "max_prompt_len", f"max_prompt_len ({prompt}) must be below max_seq_len ({longest}); lower it / 提示过长"
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


# Stages at which a setting of comparisons has an effect, and losses that read it; elsewhere another value than the default is refused.
_DPO = ("DPO",)
_REFERRED = ("DPO", "KTO", "UPO")
_STAGES = {
    **dict.fromkeys(("label_smoothing", "simpo_gamma", "dpop_lambda"), ("DPO", "UPO")),
    **dict.fromkeys(("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting"), _DPO),
    **dict.fromkeys(("loss_weights", "pref_loss_ratio", "sft_loss_ratio", "sft_loss_norm", "reference_free"), _DPO),
    "reward_shift_decay": _REFERRED,
    **dict.fromkeys(("offset_alpha", "offset_type"), ("DPO", "RM")),
    **dict.fromkeys(
        ("ref_mode", "ref_logps_path", "ref_model_update_steps", "ref_model_mixup_alpha", "beta"), _REFERRED
    ),
    **dict.fromkeys(
        (
            "term_weights",
            "kappa",
            "rank_loss",
            "rank_top_k",
            "rate_loss",
            "rate_tau",
            "rate_margin",
            "rate_alpha",
            "edge_loss",
            "bin_loss",
            "allow_base",
        ),
        ("UPO",),
    ),
    "edge_weight": ("UPO", "RM"),
    **dict.fromkeys(("image_corruption", "image_corruption_ratio", "image_corruption_noise"), ("DPO", "UPO", "RM")),
    **dict.fromkeys(
        ("desirable_weight", "undesirable_weight", "bco_density", "bco_density_min", "bco_density_max"), ("KTO", "UPO")
    ),
    **dict.fromkeys(("center_rewards_coefficient", "rating_loss", "rating_levels"), ("RM",)),
}
_READ_BY = {
    "label_smoothing": ("cdpo", "robust", "exo_pair"),
    "simpo_gamma": ("simpo",),
    "dpop_lambda": ("dpop", "dpop_outside"),
}
# Settings that one value of another reads: name -> (the other, its values that do).
_READ_WITH = {
    "f_alpha_divergence_coef": ("f_divergence_type", ("alpha_divergence",)),
    "image_corruption_ratio": ("image_corruption", ("mask", "noise")),
    "image_corruption_noise": ("image_corruption", ("noise",)),
    "rating_levels": ("rating_loss", ("ordinal",)),
    "rank_top_k": ("rank_loss", ("plackett_luce",)),
    "rate_tau": ("rate_loss", ("soft_bt", "bernoulli_kl")),
    "rate_margin": ("rate_loss", ("margin",)),
    "rate_alpha": ("rate_loss", ("margin", "infonca")),
}


def _compared(c: RunConfig) -> Iterator[Problem]:
    if c.model.stage not in ("DPO", "KTO", "UPO", "RM"):
        return
    flat, p = c.flat(), c.preference
    at_upo = c.model.stage == "UPO"
    compared = ("edge_loss", (c.signals.edge_loss,)) if at_upo else ("loss_type", p.loss_type)
    for name, stages in _STAGES.items():
        if c.model.stage not in stages and flat[name] != SETTINGS[name].default:
            yield (
                name,
                f"{name} ({flat[name]}) has no effect at stage {c.model.stage}, only at {', '.join(stages)}; remove it / 该阶段无效",
            )
    for name, losses in _READ_BY.items():
        if flat[name] != SETTINGS[name].default and not set(losses) & set(compared[1]):
            yield (
                name,
                f"{name} ({flat[name]}) must go with {compared[0]} {' or '.join(losses)}, not {','.join(compared[1])}; set one / 该损失不使用此项",
            )
    for name, (other, values) in _READ_WITH.items():
        if flat[name] != SETTINGS[name].default and flat[other] not in values:
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


def _density(c: RunConfig) -> Iterator[Problem]:
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


def _reference(c: RunConfig) -> Iterator[Problem]:
    p, m = c.reference, c.model
    if m.stage not in _REFERRED:
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

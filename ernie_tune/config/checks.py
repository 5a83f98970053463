"""Which settings fit together. A rule yields the setting to point at, and what is wrong in English and 中文.

Refuses to know: where settings were written, how to convert them, whether paths exist.
"""

from __future__ import annotations

from collections.abc import Iterator

from ernie_tune.config.arguments import RunConfig

Problem = tuple[str, str]  # (the setting to point at, message)


def problems(c: RunConfig) -> list[Problem]:
    """Contradictions between the settings of `c`; empty if there are none."""
    return [p for rule in (_data, _mixing, _training, _weights, _saving, _best, _parallel, _stage) for p in rule(c)]


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

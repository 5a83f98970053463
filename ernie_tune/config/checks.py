"""The one judgement of settings: which fit together, which this version cannot honour, which have
no effect. A rule yields the setting to point at, and what is wrong. Pure: every verb and every
trainer asks the same.

Refuses to know: where settings were written, how to convert them, whether paths exist
(plan/judgement.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.checks_methods import METHOD_RULES, weights_problem
from ernie_tune.config.checks_sampling import sampling_rules
from ernie_tune.config.convert import did_you_mean, to_yaml
from ernie_tune.config.language import Text, say
from ernie_tune.config.sections_model import TEMPLATES

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Problem(NamedTuple):
    """`setting`: the one to point at. `unbuilt`: right in itself, but this version cannot train it;
    who only counts or looks may go on.
    """

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
        _pushing,
        _best,
        _parallel,
        *METHOD_RULES,
        sampling_rules,
    )
    wrong = [Problem(*p) for rule in rules for p in rule(c)]
    return wrong + [Problem(name, message, unbuilt=True) for name, message in _unbuilt(c)]


def remarks(c: RunConfig, given: Collection[str]) -> list[tuple[str, str]]:
    """What to say of settings that somebody wrote and that have no effect: (setting, line)."""
    flat = c.flat()
    found: list[tuple[str, str]] = []
    for name in given:
        setting = SETTINGS[name]
        if not c.reads(name) and not (c.applies(setting.section) and flat[name] == setting.default):
            at = _unread_at(c, name)
            found.append((name, say(f"{name} has no effect with {at}", f"{name} 在 {at} 时无效")))
        elif setting.about.unread and flat[name] != setting.default:
            value, why = to_yaml(flat[name]), setting.about.unread
            found.append(
                (
                    name,
                    say(
                        "{name} ({value}) has no effect: {why}",
                        "{name}（{value}）无效：{why}",
                        name=name,
                        value=value,
                        why=why,
                    ),
                )
            )
    # A default that is written down, as every run's own file has them, asks for nothing.
    found += [(name, line) for name, line in _idle(c) if name in given and flat[name] != SETTINGS[name].default]
    return found


def _unread_at(c: RunConfig, name: str) -> str:
    about = SETTINGS[name].about
    if about.methods and c.model.fine_tuning not in about.methods:
        return f"fine_tuning {c.model.fine_tuning}"
    if c.model.stage in about.stages:
        return f"loss_type {','.join(c.preference.loss_type)}"
    return f"stage {c.model.stage}"


def _idle(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that others switch off."""
    e, s, o, p = c.eval, c.save, c.optim, c.parallel
    if not s.push_to_hub and s.push_hub != SETTINGS["push_hub"].default:
        yield (
            "push_hub",
            say(
                "push_hub has no effect without push_to_hub; name the repository",
                "没有 push_to_hub 时 push_hub 无效；请写出仓库名",
            ),
        )
    if c.data.greedy_intokens and not c.data.packing:
        yield (
            "greedy_intokens",
            say(
                "greedy_intokens has no effect without packing; set packing: true",
                "没有 packing 时 greedy_intokens 无效；请设 packing: true",
            ),
        )
    if p.pp_seg_method and p.pipeline_model_parallel_size == 1:
        yield (
            "pp_seg_method",
            say(
                "pp_seg_method has no effect with pipeline_model_parallel_size 1",
                "pipeline_model_parallel_size 为 1 时 pp_seg_method 无效",
            ),
        )
    if e.eval_strategy != "steps" and e.eval_steps:
        yield (
            "eval_steps",
            say(
                f"eval_steps has no effect with eval_strategy {e.eval_strategy}; set eval_strategy: steps",
                f"eval_strategy 为 {e.eval_strategy} 时 eval_steps 无效；请设 eval_strategy: steps",
            ),
        )
    if s.save_strategy != "steps" and s.save_steps:
        yield (
            "save_steps",
            say(
                f"save_steps has no effect with save_strategy {s.save_strategy}",
                f"save_strategy 为 {s.save_strategy} 时 save_steps 无效",
            ),
        )
    if (steps := c.flat()["max_steps"]) > 0:
        yield (
            "num_train_epochs",
            say(
                f"num_train_epochs has no effect with max_steps {steps}; remove one",
                f"max_steps 为 {steps} 时 num_train_epochs 无效；请去掉其一",
            ),
        )
    if c.data.eval_dataset_path:
        yield (
            "val_size",
            say(
                "val_size has no effect with eval_dataset_path, which names the held-out rows",
                "已给出 eval_dataset_path，val_size 无效",
            ),
        )
    for name in ("warmup_ratio", "warmup_steps"):
        if o.lr_scheduler_type == "constant" and c.flat()[name]:
            yield (
                name,
                say(
                    f"{name} has no effect with lr_scheduler_type constant; set constant_with_warmup",
                    f"lr_scheduler_type 为 constant 时 {name} 无效；请设 constant_with_warmup",
                ),
            )


# What only held-out rows are measured by.
_MEASURING = ("num_generations_eval", "eval_metrics", "eval_max_samples")


def unmeasured(c: RunConfig) -> list[tuple[str, Text]]:
    """(setting, line) of settings that ask for a measurement, for a run without held-out rows."""
    flat = c.flat()
    return [
        (
            name,
            say(
                "{name} ({value}) has no effect without held-out rows; give eval_dataset_path or val_size",
                "没有留出数据时 {name}（{value}）无效；请给出 eval_dataset_path 或 val_size",
                name=name,
                value=to_yaml(flat[name]),
            ),
        )
        for name in _MEASURING
        if c.reads(name) and flat[name] != SETTINGS[name].default
    ]


def missing(c: RunConfig) -> list[Problem]:
    """What a run from a file must name, and a call from Python passes as objects: the model and the
    rows.
    """
    return [Problem(*p) for p in _missing(c)]


def _missing(c: RunConfig) -> Iterator[tuple[str, str]]:
    held_out = bool(c.data.eval_dataset_path) or c.data.val_size > 0
    if not c.model.model_name_or_path:
        yield (
            "model_name_or_path",
            say(
                "model_name_or_path is missing; name a folder, hub model or preset",
                "缺少 model_name_or_path；请填写文件夹、hub 模型名或预设名",
            ),
        )
    if not c.data.train_dataset_path:
        yield (
            "train_dataset_path",
            say("train_dataset_path is missing; name a data file", "缺少 train_dataset_path；请填写数据文件"),
        )
    problem = weights_problem(c)
    if problem and not c.rollout.reward_funcs and not c.critic.reward_model:
        yield problem
    for name, wanted in (("eval_strategy", c.eval.eval_strategy != "no"), ("do_eval", c.eval.do_eval)):
        if wanted and not held_out:
            yield (
                name,
                say(
                    f"{name} ({str(c.flat()[name]).lower()}) needs rows to evaluate; set eval_dataset_path or val_size",
                    f"{name}（{str(c.flat()[name]).lower()}）需要评测数据；请设置 eval_dataset_path 或 val_size",
                ),
            )


def _data(c: RunConfig) -> Iterator[tuple[str, str]]:
    low, high = c.media.image_min_pixels, c.media.image_max_pixels
    for side in ("train", "eval"):
        files, kinds = (len(c.flat()[f"{side}_dataset_{what}"]) for what in ("path", "type"))
        if files and kinds not in (1, files):
            yield (
                f"{side}_dataset_type",
                say(
                    f"{side}_dataset_type ({kinds} values) must have one value or one a file ({files}); or set auto",
                    f"{side}_dataset_type（{kinds} 个）须只有一个，或与文件一一对应（{files} 个）；也可设为 auto",
                ),
            )
    if c.data.template not in TEMPLATES:
        yield (
            "template",
            say(
                f"template ({c.data.template}) must be one of {', '.join(TEMPLATES)}"
                f"{did_you_mean(c.data.template, TEMPLATES)}; set auto for the model's own",
                f"template（{c.data.template}）须为 {', '.join(TEMPLATES)} 之一"
                f"{did_you_mean(c.data.template, TEMPLATES)}；设 auto 则用模型自带的",
            ),
        )
    if low is not None and high is not None and low > high:
        yield (
            "image_min_pixels",
            say(
                f"image_min_pixels ({low}) must not exceed image_max_pixels ({high}); lower it",
                f"image_min_pixels（{low}）不能超过 image_max_pixels（{high}）；请调小",
            ),
        )


def _mixing(c: RunConfig) -> Iterator[tuple[str, str]]:
    files, weights = len(c.data.train_dataset_path), len(c.data.train_dataset_prob)
    name = f"train_dataset_prob ({weights} values)"
    if files and weights not in (0, files):
        yield (
            "train_dataset_prob",
            say(
                f"{name} must have one value a file of train_dataset_path ({files}); match them",
                f"{name} 须与 train_dataset_path 的文件一一对应（{files} 个）；请使个数一致",
            ),
        )
    if weights and min(c.data.train_dataset_prob) <= 0:
        yield (
            "train_dataset_prob",
            say(
                f"{name} must all be above 0; drop files that you do not want",
                f"{name} 须全部大于 0；不需要的文件请去掉",
            ),
        )
    if weights > 1 and c.data.mix_strategy == "concat":
        yield (
            "mix_strategy",
            say(
                f"mix_strategy (concat) cannot follow {name}; set mix_strategy: random",
                f"mix_strategy（concat）不使用 {name}；请设置 mix_strategy: random",
            ),
        )


def _training(c: RunConfig) -> Iterator[tuple[str, str]]:
    t, o = c.train, c.optim
    if t.max_steps == 0:
        yield (
            "max_steps",
            say(
                "max_steps (0) must be above 0, or -1 to let num_train_epochs decide; set one",
                "max_steps（0）须大于 0，或取 -1 由 num_train_epochs 决定；请设置其一",
            ),
        )
    if t.max_steps == -1 and t.num_train_epochs == 0:
        yield (
            "num_train_epochs",
            say(
                "num_train_epochs (0) must be above 0 when max_steps is -1; set one of them",
                "max_steps 为 -1 时 num_train_epochs（0）须大于 0；请设置其一",
            ),
        )
    if o.warmup_steps > 0 and o.warmup_ratio > 0:
        yield (
            "warmup_ratio",
            say(
                f"warmup_ratio ({o.warmup_ratio}) and warmup_steps ({o.warmup_steps}) must not both be set; keep one",
                f"warmup_ratio（{o.warmup_ratio}）与 warmup_steps（{o.warmup_steps}）不能同时设置；请保留其一",
            ),
        )
    if 0 < t.max_steps < o.warmup_steps:
        yield (
            "warmup_steps",
            say(
                f"warmup_steps ({o.warmup_steps}) must not exceed max_steps ({t.max_steps}); lower it",
                f"warmup_steps（{o.warmup_steps}）不能超过 max_steps（{t.max_steps}）；请调小",
            ),
        )
    if o.lr_scheduler_type.startswith("constant") and o.min_lr:
        yield (
            "min_lr",
            say(
                f"min_lr ({o.min_lr}) must be 0 with lr_scheduler_type {o.lr_scheduler_type}, which never "
                "falls; remove it",
                f"lr_scheduler_type {o.lr_scheduler_type} 从不下降，min_lr（{o.min_lr}）须为 0；请去掉",
            ),
        )
    if o.min_lr > o.learning_rate:
        yield (
            "min_lr",
            say(
                f"min_lr ({o.min_lr}) must not exceed learning_rate ({o.learning_rate}); lower it",
                f"min_lr（{o.min_lr}）不能超过 learning_rate（{o.learning_rate}）；请调小",
            ),
        )


def _weights(c: RunConfig) -> Iterator[tuple[str, str]]:
    x, f = c.compute, c.freeze
    if x.float64 and (x.bf16 or x.fp16):
        yield (
            "float64",
            say(
                "float64 (true) must not go with bf16 or fp16 (true); keep one",
                "float64（true）不能与 bf16 或 fp16（true）同用；请保留其一",
            ),
        )
    if x.float64 and c.model.stage == "RM":
        yield (
            "float64",
            say(
                "float64 (true) must be false at stage RM, whose head is float32; unset it",
                "RM 阶段的打分头为 float32，float64（true）须为 false；请取消",
            ),
        )
    if x.bf16 and x.fp16:
        yield (
            "fp16",
            say(
                "fp16 (true) and bf16 (true) must not both be set; keep one",
                "fp16（true）与 bf16（true）不能同时设置；请保留其一",
            ),
        )
    if c.lora.lora_alpha == 0:
        yield (
            "lora_alpha",
            say(
                "lora_alpha (0) must be above 0, or -1 for the default; 0 switches the adapter off",
                "lora_alpha（0）须大于 0，或取 -1 用默认值；0 会使适配器失效",
            ),
        )
    if c.lora.dora and c.lora.adapter_format == "paddlenlp":
        yield (
            "adapter_format",
            say(
                "adapter_format (paddlenlp) must be peft with dora (true): PaddleNLP has no DoRA; set peft or auto",
                "dora（true）时 adapter_format（paddlenlp）须为 peft：PaddleNLP 没有 DoRA；请设为 peft 或 auto",
            ),
        )
    if c.model.fine_tuning in ("Full", "Freeze") and x.weight_quantize_algo != "none":
        yield (
            "weight_quantize_algo",
            say(
                f"weight_quantize_algo ({x.weight_quantize_algo}) must go with adapters (fine_tuning "
                f"LoRA), not {c.model.fine_tuning}; change one",
                f"weight_quantize_algo（{x.weight_quantize_algo}）须与适配器（fine_tuning "
                f"LoRA）同用，不能是 {c.model.fine_tuning}；请修改其一",
            ),
        )
    if c.model.fine_tuning == "Freeze" and not any(vars(f).values()):
        yield (
            "fine_tuning",
            say(
                "fine_tuning (Freeze) must come with trainable_layers, frozen_layers, freeze_spec or "
                "freeze_config; set one, or fine_tuning: Full",
                "fine_tuning（Freeze）须与 trainable_layers、frozen_layers、freeze_spec 或 freeze_config "
                "同用；请设置其一，或改为 fine_tuning: Full",
            ),
        )
    if f.freeze_spec and (f.trainable_layers or f.frozen_layers):
        yield (
            "freeze_spec",
            say(
                f"freeze_spec ({f.freeze_spec}) must not go with trainable_layers or frozen_layers; keep one",
                f"freeze_spec（{f.freeze_spec}）不能与 trainable_layers 或 frozen_layers 同用；请保留其一",
            ),
        )


def _pushing(c: RunConfig) -> Iterator[tuple[str, str]]:
    name = c.save.push_to_hub
    if name and not _REPOSITORY.fullmatch(name):
        yield (
            "push_to_hub",
            say(
                f"push_to_hub ({name}) must be the repository, owner/model; name it",
                f"push_to_hub（{name}）须为仓库名 owner/model；请写出",
            ),
        )


def _saving(c: RunConfig) -> Iterator[tuple[str, str]]:
    e, s = c.eval, c.save
    if e.eval_strategy == "steps" and e.eval_steps == 0:
        yield (
            "eval_strategy",
            say(
                "eval_strategy (steps) needs eval_steps (0) above 0; set eval_steps",
                "eval_strategy（steps）需要 eval_steps（0）大于 0；请设置 eval_steps",
            ),
        )
    if s.save_strategy == "steps" and s.save_steps == 0:
        yield (
            "save_steps",
            say(
                "save_steps (0) must be above 0 when save_strategy is steps; raise it",
                "save_strategy 为 steps 时 save_steps（0）须大于 0；请调大",
            ),
        )
    if e.early_stopping_patience > 0 and e.eval_strategy == "no":
        yield (
            "early_stopping_patience",
            say(
                f"early_stopping_patience ({e.early_stopping_patience}) counts evaluations; set eval_strategy",
                f"early_stopping_patience（{e.early_stopping_patience}）以评测次数计；请设置 eval_strategy",
            ),
        )

    if e.guard_dataset_path and e.eval_strategy == "no":
        yield (
            "guard_dataset_path",
            say(
                "guard_dataset_path is looked at when evaluating and must go with eval_strategy steps or "
                "epoch, not no; set eval_strategy",
                "guard_dataset_path 在评测时检查，须与 eval_strategy steps 或 epoch 同用，不能为 "
                "no；请设置 eval_strategy",
            ),
        )


def _best(c: RunConfig) -> Iterator[tuple[str, str]]:
    e, s = c.eval, c.save
    if not e.load_best_model_at_end:
        return
    if e.eval_strategy == "no" or s.save_strategy != e.eval_strategy:
        yield (
            "load_best_model_at_end",
            say(
                f"load_best_model_at_end (true) needs save_strategy ({s.save_strategy}) and eval_strategy "
                f"({e.eval_strategy}) alike and not no; set both",
                f"load_best_model_at_end（true）要求 save_strategy（{s.save_strategy}）与 eval_strategy（"
                f"{e.eval_strategy}）一致且不为 no；请同时设置",
            ),
        )
    elif e.eval_strategy == "steps" and e.eval_steps > 0 and s.save_steps % e.eval_steps:
        yield (
            "save_steps",
            say(
                f"save_steps ({s.save_steps}) must be a multiple of eval_steps ({e.eval_steps}); change one",
                f"save_steps（{s.save_steps}）须为 eval_steps（{e.eval_steps}）的倍数；请修改其一",
            ),
        )


def _parallel(c: RunConfig) -> Iterator[tuple[str, str]]:
    p, virtual = c.parallel, "virtual_pipeline_model_parallel_size"
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "sequence_parallel",
            say(
                "sequence_parallel (true) needs tensor_model_parallel_size (1) above 1; raise it",
                "sequence_parallel（true）需要 tensor_model_parallel_size（1）大于 1；请调大",
            ),
        )
    if p.expert_model_parallel_size > 1 and p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        yield (
            "sequence_parallel",
            say(
                "sequence_parallel (false) must be true with expert_model_parallel_size ("
                f"{p.expert_model_parallel_size}) and tensor_model_parallel_size ("
                f"{p.tensor_model_parallel_size}), else every tensor rank sends the same tokens; set it",
                f"expert_model_parallel_size（{p.expert_model_parallel_size}）与 "
                f"tensor_model_parallel_size（{p.tensor_model_parallel_size}）同用时 "
                "sequence_parallel（false）须为 true，否则各张量进程发送相同的 token；请设置",
            ),
        )
    if p.virtual_pipeline_model_parallel_size > 1 and p.pipeline_model_parallel_size == 1:
        yield (
            virtual,
            say(
                f"{virtual} ({p.virtual_pipeline_model_parallel_size}) needs pipeline_model_parallel_size "
                "(1) above 1; raise it",
                f"{virtual}（{p.virtual_pipeline_model_parallel_size}）需要 "
                "pipeline_model_parallel_size（1）大于 1；请调大",
            ),
        )
    if p.sharding == "off" and p.sharding_parallel_size > 1:
        yield (
            "sharding_parallel_size",
            say(
                f"sharding_parallel_size ({p.sharding_parallel_size}) must be 1 while sharding is off; "
                "set sharding: stage1",
                f"未开启 sharding 时 sharding_parallel_size（{p.sharding_parallel_size}）须为 1；请设置 "
                "sharding: stage1",
            ),
        )


def _unbuilt(c: RunConfig) -> Iterator[tuple[str, str]]:
    """What may be written, but not trained yet: refused, since leaving it out would change the
    result.
    """
    flat = c.flat()
    for name, setting in SETTINGS.items():
        if setting.about.unbuilt and flat[name] != setting.default and c.reads(name):
            yield (
                name,
                say(
                    "{name} ({value}) has no effect in this version, must be left at {default}; {why}",
                    "{name}（{value}）在此版本无效，须保持 {default}；{why}",
                    name=name,
                    value=to_yaml(flat[name]),
                    default=to_yaml(setting.default),
                    why=setting.about.unbuilt,
                ),
            )
    if c.parallel.sharding.endswith("offload"):
        stage = c.parallel.sharding.split()[0]
        yield (
            "sharding",
            say(
                f"sharding ({c.parallel.sharding}) must be without offload in this version; set {stage}",
                f"此版本 sharding（{c.parallel.sharding}）不支持 offload；请设为 {stage}",
            ),
        )

"""Adapter folders: written complete or not at all, in PaddleNLP's or PEFT's form, and read in
either.

paddlenlp: `lora_config.json`, `peft_model-00001-of-00001.safetensors`,
    `peft_model.safetensors.index.json`; LoRA without DoRA only.
peft: `adapter_config.json`, `adapter_model.safetensors`; LoRA as the PEFT library reads it,
    prompts, and two kinds of our own.
Refuses to know: layers, the model's weights, paddle.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import NUMPY_TYPES, TensorReader, cast
from ernie_tune.checkpoint.writer import refuse_file, write_file
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.peft import dialects
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PeftConfig, PrefixConfig, PromptConfig

DIALECTS = ("auto", "paddlenlp", "peft")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
PADDLE_FILES = (
    "lora_config.json",
    "peft_model-00001-of-00001.safetensors",
    "peft_model.safetensors.index.json",
)
_TYPES: dict[str, type] = {
    "PROMPT_TUNING": PromptConfig,
    "ERNIE_TUNE_PREFIX": PrefixConfig,
    "ERNIE_TUNE_BOTTLENECK": BottleneckConfig,
}
# settings that change what the tensors mean, and the value they must have if they are there
_REFUSED: dict[str, Any] = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "do_qat": False,
    "lora_use_mixer": False,
    "use_mora": False,
    "pissa": False,
    "loraga": False,
}
# ways to start that change the base: such an adapter fits another base than ours
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CODE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Stored:
    """One adapter outside a model: settings and float32 arrays under our names (`dialects.py`)."""

    config: PeftConfig
    tensors: dialects.Tensors


def write_adapter(folder: Path, adapter: Stored, model: ModelConfig, dialect: str, code: str) -> list[Path]:
    """Write one adapter, tensors as safetensors type `code`; "auto" takes paddlenlp for what it can
    express. Returns the paths.

    Raises ValueError for a dialect that is unknown or cannot hold this adapter, or a folder that is
    a file.
    """
    if dialect not in DIALECTS:
        raise ValueError(
            say(
                f"dialect ({dialect!r}) must be one of {DIALECTS}; choose one of them",
                f"dialect（{dialect!r}）须为 {DIALECTS} 之一；请选择其一",
            )
        )
    lora = adapter.config if isinstance(adapter.config, LoraConfig) else None
    if dialect == "auto":
        dialect = "paddlenlp" if lora and not lora.use_dora else "peft"
    if dialect == "paddlenlp" and lora is None:
        raise ValueError(
            say(
                f"dialect ('paddlenlp') must go with LoRA, not with {type(adapter.config).__name__}; save with "
                "dialect='peft'",
                f"dialect（'paddlenlp'）只用于 LoRA，不用于 {type(adapter.config).__name__}；请用 dialect='peft' 保存",
            )
        )
    files: tuple[str, ...] = PEFT_FILES
    stored = dialects.without_blank(adapter.tensors) if lora else adapter.tensors
    if dialect == "paddlenlp" and lora:
        tensors = dialects.to_paddle(stored, model)
        settings = _paddle_settings(lora, stored, model, code)
        files = PADDLE_FILES
    else:
        tensors = dialects.to_peft(stored, model) if lora else stored
        settings = _peft_settings(lora, stored, model) if lora else _own_settings(adapter.config)
    texts = {files[0]: settings}
    if dialect == "paddlenlp":
        size = sum(value.size for value in tensors.values()) * NUMPY_TYPES[code].itemsize
        texts[files[2]] = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, files[1])}
    return _publish(folder, files, tensors, texts, code, {"format": "np" if dialect == "paddlenlp" else "pt"})


def _publish(
    folder: Path,
    files: tuple[str, ...],
    tensors: dialects.Tensors,
    texts: Mapping[str, dict[str, Any]],
    code: str,
    metadata: dict[str, str],
) -> list[Path]:
    """Everything goes to `<folder>.tmp` first. In a folder that exists the old adapter's settings
    go first and the new ones come last.
    """
    refuse_file(folder)
    folder = folder.resolve()
    staged = folder.with_name(folder.name + ".tmp")
    foreign = [x.name for x in staged.glob("*") if x.name not in PADDLE_FILES + PEFT_FILES]
    if foreign:
        raise ValueError(
            say(
                f"{staged} must be free for the unfinished save, but holds {foreign[0]!r}; move it away",
                f"{staged} 须留给未完成的保存，但其中有 {foreign[0]!r}；请移走",
            )
        )
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    entries = {key: (value.shape, code) for key, value in tensors.items()}
    write_file(staged / files[1], entries, lambda key: cast(tensors[key].astype(np.float32), "F32", code), metadata)
    for name, text in texts.items():
        (staged / name).write_text(json.dumps(text, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not folder.exists():
        os.replace(staged, folder)
    else:
        for old in (PADDLE_FILES[0], PEFT_FILES[0], *PADDLE_FILES[1:], *PEFT_FILES[1:]):
            (folder / old).unlink(missing_ok=True)
        for name in (*files[1:], files[0]):
            os.replace(staged / name, folder / name)
        staged.rmdir()
    return [folder / name for name in files]


def _saved_modules(tensors: dialects.Tensors) -> list[str]:
    """Modules trained in full: the owners of tensors that are no factors."""
    owners = (key.rpartition(".") for key in tensors)
    return list(dict.fromkeys(owner for owner, _, leaf in owners if leaf not in dialects.FACTORS))


def _peft_settings(config: LoraConfig, tensors: dialects.Tensors, model: ModelConfig) -> dict[str, Any]:
    linear, stacked = dialects.hf_targets(tensors, model)
    if stacked and config.lora_dropout:
        print(
            f"ernie_tune: lora_dropout {config.lora_dropout} is written as 0: PEFT has none for experts",
            file=sys.stderr,
            flush=True,
        )
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0 if stacked else config.lora_dropout,
        "target_modules": linear,
        "target_parameters": stacked or None,
        "modules_to_save": [dialects.hf_name(name, model) for name in _saved_modules(tensors)] or None,
        "bias": config.bias,
        "use_rslora": config.rslora,
        "use_dora": config.use_dora,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _paddle_settings(config: LoraConfig, tensors: dialects.Tensors, model: ModelConfig, code: str) -> dict[str, Any]:
    owners = dict.fromkeys(
        key.rpartition(".")[0] for key in dialects.to_paddle(tensors, model) if key.endswith((".lora_A", ".lora_B"))
    )
    saved = [re.escape(dialects.paddle_name(name)) + r"\..*" for name in _saved_modules(tensors)]
    return {
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.lora_dropout,
        "scaling": config.scaling,
        "rslora": config.rslora,
        "lora_plus_scale": config.lora_plus_scale,
        "target_modules": [re.escape(owner) for owner in owners],
        "trainable_modules": saved or None,
        "trainable_bias": None,
        "dtype": _CODE_NAMES[code],
        "head_dim": model.head_dim,
        "enable_lora_list": None,
        "tensor_parallel_degree": -1,
        "merge_weights": False,
        "do_qat": False,
        "lora_use_mixer": False,
        "use_mora": False,
        "use_quick_lora": False,
        "pissa": False,
        "loraga": False,
    }


def _own_settings(config: PeftConfig) -> dict[str, Any]:
    kind = next(name for name, cls in _TYPES.items() if isinstance(config, cls))
    return {"peft_type": kind, "task_type": "CAUSAL_LM", "inference_mode": True, **dataclasses.asdict(config)}


# --- reading --------------------------------------------------------------------------------------


def read_adapter(folder: Path, model: ModelConfig) -> Stored:
    """The adapter in a folder, whose dialect is found out. Which layers it has follows from its
    tensors, not from the patterns in its settings.

    Raises FileNotFoundError where there is none, ValueError (naming the file) for settings we
    cannot honour and tensors that do not fit the model.
    """
    found = [name for name in (PADDLE_FILES[0], PEFT_FILES[0]) if (folder / name).is_file()]
    if len(found) != 1:
        if found:
            raise ValueError(
                say(
                    f"{folder} must hold one adapter, but holds {' and '.join(found)}; delete one of them",
                    f"{folder} 中须只有一个适配器，但有 {' and '.join(found)}；请删除其一",
                )
            )
        raise FileNotFoundError(
            say(
                f"{folder} must hold {PADDLE_FILES[0]} or {PEFT_FILES[0]}; a folder of model weights is "
                "loaded with AutoModel.from_pretrained",
                f"{folder} 中须有 {PADDLE_FILES[0]} 或 {PEFT_FILES[0]}；模型权重文件夹请用 "
                "AutoModel.from_pretrained 加载",
            )
        )
    settings = _read_settings(folder / found[0])
    paddle = found[0] == PADDLE_FILES[0]
    weights = folder / (PADDLE_FILES[1] if paddle else PEFT_FILES[1])
    if not weights.is_file():
        raise FileNotFoundError(
            say(
                f"{folder} must hold {weights.name} beside {found[0]}; pickled adapters (.pdparams, .bin) "
                "are not read: save as safetensors",
                f"{folder} 中 {found[0]} 旁须有 {weights.name}；不读取 pickle "
                "适配器（.pdparams、.bin）：请保存为 safetensors",
            )
        )
    reader = TensorReader(weights)
    tensors = {key: np.array(cast(reader.read(key), entry.dtype, "F32")) for key, entry in reader.entries.items()}
    kind = settings.get("peft_type", "LORA")
    if kind in _TYPES:
        fields = {field.name for field in dataclasses.fields(_TYPES[kind])}
        return Stored(_TYPES[kind](**{key: value for key, value in settings.items() if key in fields}), tensors)
    if kind != "LORA":
        raise ValueError(
            say(
                f"{folder / found[0]}: peft_type ({kind!r}) must be one of {['LORA', *_TYPES]}; train the adapter "
                "with one of them",
                f"{folder / found[0]}：peft_type（{kind!r}）须为 {['LORA', *_TYPES]} 之一；请用其中一种训练适配器",
            )
        )
    r = int(settings["r"])
    if paddle:
        tensors = dialects.from_paddle(tensors, model)
    else:
        tensors = dialects.from_peft(tensors, model, r, list(settings.get("target_parameters") or ()))
    _check_factors(tensors, model, r, weights)
    tensors = dialects.with_both_products(tensors, model, r)
    return Stored(_lora_config(settings, tensors), tensors)


def _read_settings(file: Path) -> dict[str, Any]:
    settings = read_json_object(file, say("fetch the adapter again", "请重新获取适配器"))
    for name, wanted in _REFUSED.items():
        if settings.get(name) not in (None, wanted):
            raise ValueError(
                say(
                    f"{file}: {name} ({settings[name]!r}) must be {wanted!r}; merge such an adapter with the tool "
                    "that made it",
                    f"{file}：{name}（{settings[name]!r}）须为 {wanted!r}；请用生成该适配器的工具合并它",
                )
            )
    start = str(settings.get("init_lora_weights"))
    if start.startswith(_OTHER_BASE):
        raise ValueError(
            say(
                f"{file}: init_lora_weights ({start!r}) must leave the base as it was; convert the adapter with "
                "PEFT (path_initial_model_for_weight_conversion)",
                f"{file}：init_lora_weights（{start!r}）不能改动基础模型；请用 PEFT 转换适配器（path_initial_model_for_weight_conversion）",
            )
        )
    absent = [
        name for name in ("r", "lora_alpha") if settings.get("peft_type", "LORA") == "LORA" and name not in settings
    ]
    if absent:
        raise ValueError(
            say(
                f"{file} must hold {absent[0]}; fetch the adapter again", f"{file} 中须有 {absent[0]}；请重新获取适配器"
            )
        )
    scaling = settings.get("scaling")
    if scaling is not None and not math.isclose(scaling, _lora_config(settings, {}).scaling, rel_tol=1e-6):
        raise ValueError(
            say(
                f"{file}: scaling ({scaling}) must follow from lora_alpha ({settings['lora_alpha']}), r "
                f"({settings['r']}) and rslora; correct lora_alpha",
                f"{file}：scaling（{scaling}）须由 lora_alpha（{settings['lora_alpha']}）、r（{settings['r']}）与 rslora 得出；"
                "请改正 lora_alpha",
            )
        )
    return dict(settings)


def _lora_config(settings: Mapping[str, Any], tensors: dialects.Tensors) -> LoraConfig:
    experts = [split_key for key in tensors if (split_key := dialects.split_expert(key))]
    linear = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    return LoraConfig(
        r=int(settings["r"]),
        lora_alpha=settings["lora_alpha"],
        target_modules=[name for name in linear if dialects.split_expert(name + ".lora_A") is None],
        lora_dropout=settings.get("lora_dropout") or 0.0,
        bias=settings.get("bias") or "none",
        rslora=bool(settings.get("rslora") or settings.get("use_rslora")),
        lora_plus_scale=settings.get("lora_plus_scale") or 1.0,
        use_dora=bool(settings.get("use_dora")),
        expert_targets=sorted({(layer, modality, expert) for _, layer, modality, expert, _ in experts}),
        modules_to_save=_saved_modules(tensors),
        freeze_config="",
        base_model_name_or_path=settings.get("base_model_name_or_path") or "",
    )


def lora_of_tensors(config: LoraConfig, tensors: dialects.Tensors, model: ModelConfig) -> Stored:
    """An adapter in memory, its layers as its tensors (of our names) have them. ValueError for
    tensors that do not fit the model.
    """
    _check_factors(tensors, model, config.r, Path("LoRAModel"))
    tensors = dialects.with_both_products(tensors, model, config.r)
    found = _lora_config(dataclasses.asdict(config), tensors)
    return Stored(dataclasses.replace(found, freeze_config="", lora_alpha=config.alpha), tensors)


def _check_factors(tensors: dialects.Tensors, model: ModelConfig, r: int, file: Path) -> None:
    """Every A has its B and both have the shapes of their module."""
    for key, value in tensors.items():
        owner, _, factor = key.rpartition(".")
        if factor not in dialects.FACTORS:
            continue
        expert = dialects.split_expert(key)
        n_in, n_out = dialects.shape_of(expert[0] if expert else owner, model)
        wanted = {"lora_A": (n_in, r), "lora_B": (r, n_out), "magnitude": (n_out,)}[factor]
        if value.shape != wanted:
            raise ValueError(
                say(
                    f"{file}: {key} {list(value.shape)} must be {list(wanted)} for rank {r}; load the adapter "
                    "on its own base model",
                    f"{file}：秩为 {r} 时 {key} {list(value.shape)} 须为 {list(wanted)}；请在适配器自己的底座上加载",
                )
            )
        missing = [name for name in ("lora_A", "lora_B") if f"{owner}.{name}" not in tensors]
        if missing:
            raise ValueError(
                say(
                    f"{file}: {owner} must have lora_A and lora_B, but {missing[0]} is missing; fetch the "
                    "adapter again",
                    f"{file}：{owner} 须有 lora_A 与 lora_B，缺少 {missing[0]}；请重新获取适配器",
                )
            )

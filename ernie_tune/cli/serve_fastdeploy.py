"""`ernie-tune serve --engine fastdeploy`: words of the command line -> FastDeploy's command.
Refuses to know: how it is run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.fastdeploy import FastDeployCommand
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say
from ernie_tune.config.loader import Entry
from ernie_tune.data.processor import PREPROCESSOR_FILE, media_settings
from ernie_tune.data.templates import RELEASED
from ernie_tune.export.processor_rules import NoTemplate, template_of, vocabulary_findings
from ernie_tune.export.served import media_arguments

READY_SECONDS = 1800.0


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(
            say('not an object like {"image_max_pixels": 1003520}', '须为形如 {"image_max_pixels": 1003520} 的对象')
        )
    return value


def _counts(text: str) -> dict[str, int]:
    value = json.loads(text)
    if not isinstance(value, dict) or not all(type(count) is int for count in value.values()):
        raise ValueError(
            say('not an object of whole numbers like {"image": 10}', '须为由整数组成的对象，如 {"image": 10}')
        )
    return value


# FastDeploy's flag -> (field of its command, how the text is read)
_FLAGS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "port": ("port", int),
    "tensor_parallel_size": ("tensor_parallel_size", int),
    "quantization": ("quantization", str),
    "max_model_len": ("max_model_len", int),
    "max_num_seqs": ("max_num_seqs", int),
    "mm_processor_kwargs": ("mm_processor", _object),
    "limit_mm_per_prompt": ("limits", _counts),
    "reasoning_parser": ("reasoning_parser", str),
}


def fastdeploy_command(model: str, entries: Sequence[Entry]) -> tuple[FastDeployCommand, bool, float]:
    """(the command, whether only to print it, seconds to wait for health). Raises UsageError for
    options that it does not have.
    """
    from ernie_tune.config.convert import did_you_mean

    fields: dict[str, Any] = {"vision": _has_vision(Path(model))}
    only_print, ready = False, READY_SECONDS
    for entry in entries:
        try:
            if entry.name in _FLAGS:
                field, read = _FLAGS[entry.name]
                fields[field] = read(str(entry.raw))
            elif entry.name == "print":
                only_print = entry.raw != "false"
            elif entry.name == "ready_timeout":
                ready = float(str(entry.raw))
            elif entry.name != "engine":
                raise UsageError(
                    say(
                        f"unknown option {entry.name!r}{did_you_mean(entry.name, _FLAGS)}; with --engine "
                        f"fastdeploy serve takes {', '.join(_FLAGS)}, ready_timeout and print; merge adapters "
                        "first (ernie-tune export)",
                        f"未知的选项 {entry.name!r}{did_you_mean(entry.name, _FLAGS)}；--engine fastdeploy 时 "
                        f"serve 的选项为 {', '.join(_FLAGS)}、ready_timeout 和 print；适配器请先合并（ernie-tune "
                        "export）",
                    )
                )
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                say(
                    f"{entry.name} ({entry.raw!r}) cannot be read: {error}",
                    f"{entry.name}（{entry.raw!r}）无法读取：{error}",
                )
            ) from error
    if fields["vision"] and Path(model).is_dir():
        _check_prompts(Path(model))
    fields.setdefault("max_model_len", _context(Path(model)))
    fields["mm_processor"] = {**_settings(Path(model)), **fields.get("mm_processor", {})}
    if not fields["mm_processor"]:  # a name that FastDeploy is to download: the published example's
        del fields["mm_processor"]
    return dataclasses.replace(FastDeployCommand(model), **fields), only_print, ready


def _check_prompts(folder: Path) -> None:
    """Say what FastDeploy would not generate or would route wrongly. ValueError where it would lose
    every picture or clip: folders of earlier versions have another reader's placeholders.
    """
    for line in vocabulary_findings(folder):
        print(f"ernie_tune: {line}", file=sys.stderr, flush=True)
    try:
        text = template_of(folder)
    except NoTemplate:  # FastDeploy stops there and says so
        return
    for placeholder, media in (
        (RELEASED.image, say("picture", "图片")),
        (RELEASED.video, say("clip", "视频")),
    ):
        if placeholder not in text:
            raise ValueError(
                say(
                    f"chat template of {folder} must hold {placeholder}: FastDeploy would drop every {media} "
                    f"without an error; export the folder, which mends it (ernie-tune export {folder})",
                    f"{folder} 的对话模板须含 {placeholder}：否则 FastDeploy 会不声不响地丢掉所有{media}；请先"
                    f"导出，导出时会修好（ernie-tune export {folder}）",
                )
            )


def _settings(folder: Path) -> dict[str, Any]:
    """The folder's limits of pictures and clips; {} where it has none."""
    if not (folder / PREPROCESSOR_FILE).is_file():
        return {}
    _, images, videos = media_settings(folder)
    told, untold = media_arguments(images, videos)
    for line in untold:
        print(f"ernie_tune: {line}", file=sys.stderr, flush=True)
    return told


def _context(folder: Path) -> int:
    """Tokens that prompt and answer may have: FastDeploy's command has one number for all
    models.
    """
    file, most = folder / "config.json", FastDeployCommand.max_model_len
    told = read_json_object(file).get("max_position_embeddings") if file.is_file() else None
    return min(most, told) if type(told) is int and told > 0 else most


def _has_vision(folder: Path) -> bool:
    """Whether images are served; True for a name that FastDeploy is to download. Raises ValueError
    for a folder without a model.
    """
    if not folder.is_dir():
        return True
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            say(
                f"{folder} must hold config.json for FastDeploy; merge and export adapters and runs first "
                "(ernie-tune export)",
                f"FastDeploy 需要 {folder} 中有 config.json；适配器和训练结果请先合并导出（ernie-tune export）",
            )
        )
    return "vision_config" in read_json_object(file)


def run_fastdeploy(model: str, entries: Sequence[Entry]) -> int:
    """Print the command, or run it to its end; its exit code."""
    command, only_print, ready = fastdeploy_command(model, entries)
    if only_print:
        print(command.shell())
        return 0
    from ernie_tune.serve.fastdeploy import run

    return run(command, ready)

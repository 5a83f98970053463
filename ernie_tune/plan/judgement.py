"""What every verb asks of a run before it starts: whether the model can be cut as the settings say,
and whether model and rows are there.

`config/checks.py` judges settings alone; here they meet the files and the model's shape. Nothing is
loaded but a config.json and, where something is missing, the output_dir of recipes nearby, to say
who makes it.
Refuses to know: paddle, the hubs' caches (checkpoint/hub.py looks there), what is in the rows
(data/).
"""

from __future__ import annotations

import ast
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.checks import unmeasured
from ernie_tune.config.checks_sampling import function_problem
from ernie_tune.config.language import Text, say
from ernie_tune.config.loader import Loaded
from ernie_tune.config.sections_online import CHECKERS
from ernie_tune.config.sections_run import LOGGERS, has_logger
from ernie_tune.models.presets import is_fresh, shipped_name
from ernie_tune.peft.packed_header import is_packed
from ernie_tune.plan.job import known_shape
from ernie_tune.plan.layouts import run_problems

INFO_FILE = "dataset_info.json"  # names of data sets, as LLaMA-Factory keeps them
# Families of models that are not ours, by words in their hub names.
_OTHERS = re.compile(
    r"qwen|llama|internvl|internlm|gemma|mistral|mixtral|deepseek|glm|phi-|minicpm|llava|baichuan|gpt|kimi|yi-|falcon|olmo|smol|paligemma|idefics|florence",
    re.IGNORECASE,
)
_OUTPUT = re.compile(r"^output_dir:\s*[\"']?([^\"'#]+?)[\"']?\s*(?:#.*)?$", re.MULTILINE)


class Lack(NamedTuple):
    """Something that a setting names and that is not there. `certain`: no other place is left where
    it could be.
    """

    setting: str
    message: Text
    certain: bool


def judged(loaded: Loaded, where: str, *, training: bool) -> tuple[str, ...]:
    """What to tell of a run beside `loaded.notes`: lines, each with its place. `where` stands for
    settings that nobody wrote.

    Raises ValueError, one line a mistake, for a model that is not ours or cannot be cut as the
    degrees say, and, if `training`, for what is not there.
    """
    config = loaded.config

    def at(setting: str) -> str:
        return loaded.sources[setting].where if setting in loaded.sources else where

    lacks = list(absent(config, Path(where.rpartition(":")[0]).parent))
    packed = packed_conflicts(config) if is_packed(Path(config.model.model_name_or_path)) else ()
    wrong = [f"{at(name)}: {message}" for name, message in (*foreign(config), *packed)]
    wrong += [f"{at(lack.setting)}: {lack.message}" for lack in lacks if training and lack.certain]
    notes = [f"{at(lack.setting)}: {lack.message}" for lack in lacks if not training]
    if not (training or config.data.eval_dataset_path or config.data.val_size):
        notes += [f"{at(name)}: {line}" for name, line in unmeasured(config)]
    shape = known_shape(config.model.model_name_or_path)
    if shape is not None:
        wrong += [
            f"{at(name)}: {message}"
            for name, message in run_problems(config.parallel, config.train.gradient_accumulation_steps, shape)
        ]
    elif not training:
        notes.append(
            f"{at('model_name_or_path')}: "
            + say(
                f"{config.model.model_name_or_path} is not here: degrees of parallelism were not checked",
                f"本机没有 {config.model.model_name_or_path}：未检查并行度",
            )
        )
    if wrong:
        raise ValueError("\n".join(wrong))
    return tuple(notes)


def foreign(config: RunConfig) -> Iterator[tuple[str, Text]]:
    """Models of other families: (setting, what to do)."""
    name = config.model.model_name_or_path
    if not Path(name).exists() and name.count("/") == 1 and _OTHERS.search(name) and "ernie" not in name.lower():
        yield (
            "model_name_or_path",
            say(
                f"model_name_or_path ({name}) must be an ERNIE 4.5 model, no other family is trained here; take e.g. "
                "baidu/ERNIE-4.5-VL-28B-A3B-PT, nano (comes with the package), or a preset: tiny-a, small",
                f"model_name_or_path（{name}）须为 ERNIE 4.5 模型，此处不训练其他系列；可用 baidu/ERNIE-4.5-VL-28B-A3B-PT、"
                "随包附带的 nano，或预设 tiny-a、small",
            ),
        )


def packed_conflicts(config: RunConfig) -> Iterator[tuple[str, Text]]:
    """What a base of int8 or int4 codes cannot follow, for nothing trains or rounds these again.
    The model of `config` is taken to be one.
    """
    folder, method, algorithm = (
        Path(config.model.model_name_or_path),
        config.model.fine_tuning,
        config.compute.weight_quantize_algo,
    )
    if method in ("Full", "Freeze"):
        yield (
            "fine_tuning",
            say(
                f"fine_tuning ({method}) must be LoRA or an added layer for {folder}, whose weights are packed codes; "
                "set fine_tuning: LoRA, or give the folder that it was exported from",
                f"{folder} 的权重是打包的量化编码，fine_tuning（{method}）须为 LoRA 或附加层；"
                "请设 fine_tuning: LoRA，或改用导出前的文件夹",
            ),
        )
    if algorithm != "none":
        yield (
            "weight_quantize_algo",
            say(
                f"weight_quantize_algo ({algorithm}) must be none for {folder}, which is quantised already; take it out",
                f"{folder} 已经量化，weight_quantize_algo（{algorithm}）须为 none；请去掉该设置",
            ),
        )


def absent(config: RunConfig, beside: Path = Path()) -> Iterator[Lack]:
    """What the settings name and is not on this machine. `beside`: the folder of the YAML file, for
    remedies.
    """
    d = config.data
    yield from _model(config, beside)
    yield from _rewards(config, beside)
    for setting, paths in (
        ("train_dataset_path", d.train_dataset_path),
        ("eval_dataset_path", d.eval_dataset_path),
        ("guard_dataset_path", config.eval.guard_dataset_path),
    ):
        for path in paths:
            yield from _rows(setting, path, d.dataset_dir or ".", beside)
    for name in config.log.report_to:
        if name in LOGGERS and not has_logger(name):
            package = LOGGERS[name]
            message = say(
                f"report_to ({name}) needs the package {package}; pip install {package}, or take it out",
                f"report_to（{name}）需要软件包 {package}；请 pip install {package}，或去掉该项",
            )
            yield Lack("report_to", message, True)
    yield from _place(config.save.output_dir)
    resumed = config.save.resume_from_checkpoint
    named = {
        "reward_model": config.critic.reward_model,
        "value_model": "" if config.critic.value_model in ("auto", "policy") else config.critic.value_model,
        "teacher_model": "" if config.teacher.teacher_model in ("base", "self") else config.teacher.teacher_model,
        "lora_path": config.lora.lora_path,
        "freeze_spec": config.freeze.freeze_spec,
        "resume_from_checkpoint": "" if resumed in ("auto", "no") else resumed,
    }
    for setting, path in named.items():
        if path and not os.path.exists(path):
            yield Lack(setting, _lacking(setting, path, beside), True)


def _rewards(config: RunConfig, beside: Path) -> Iterator[Lack]:
    """Rewards that are no checker and nothing that is here. A function is looked for in the text of
    its file, which is not run.
    """
    if not SETTINGS["reward_funcs"].read_at(config.model.stage, config.model.fine_tuning):
        return
    for name in config.rollout.reward_funcs:
        file, _, function = name.rpartition(":")
        if name in CHECKERS or name.startswith("judge:") or os.path.isdir(name):
            continue
        if ".py:" in name and os.path.isfile(file) and _defines(Path(file), function):
            continue
        if file.endswith(".py") and not os.path.exists(file):
            yield Lack("reward_funcs", _lacking("reward_funcs", file, beside), True)
            continue
        if ".py:" in name:
            yield Lack("reward_funcs", function_problem(name, _functions(Path(file))), True)
            continue
        checkers = ", ".join(CHECKERS)
        message = say(
            f"reward_funcs ({name}) must be a checker ({checkers}), file.py:function, the folder of a reward model, or "
            "judge:http://…, and be there; correct it",
            f"reward_funcs（{name}）须为检查器（{checkers}）、file.py:function、奖励模型的目录，或 judge:http://…，且须存在；请改正",
        )
        yield Lack("reward_funcs", message, True)


def _defines(file: Path, name: str) -> bool:
    """Whether a file of Python gives `name` a value; yes for one that cannot be read so."""
    try:
        found = ast.walk(ast.parse(file.read_bytes()))
    except (SyntaxError, ValueError):  # the run says what is wrong with it
        return True
    for node in found:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
        if isinstance(node, ast.alias) and (node.asname or node.name) in (name, "*"):
            return True
    return False


def _functions(file: Path) -> list[str]:
    """What a file of Python defines for others at its top: functions and classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node.name for node in ast.parse(file.read_bytes()).body if isinstance(node, kinds)]
    return [name for name in found if not name.startswith("_")]


def _model(config: RunConfig, beside: Path) -> Iterator[Lack]:
    setting, name = "model_name_or_path", config.model.model_name_or_path
    if not name or Path(name).exists() or is_fresh(name) or shipped_name(name):
        return
    maker = recipe_that_makes(name, beside)
    repository = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).parent.is_dir()
    if maker is not None or not repository:
        yield Lack(setting, _lacking(setting, name, beside), True)
        return
    hub = config.model.download_hub
    if hub != "none":
        yield Lack(setting, say(f"{name} is fetched from {hub}", f"{name} 将从 {hub} 下载"), False)
        return
    yield Lack(
        setting,
        say(
            f"{setting} ({name}) is no folder here; unless a hub's cache has it, set download_hub: huggingface, modelscope or aistudio, "
            "or name its folder",
            f"{setting}（{name}）不是本机文件夹；若模型库缓存中也没有，请设置 download_hub: huggingface、modelscope 或 aistudio，或写出其文件夹",
        ),
        False,
    )


def _place(output_dir: str) -> Iterator[Lack]:
    """Where a run cannot write."""
    folder = Path(output_dir).absolute()
    held = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not output_dir:
        yield Lack("output_dir", say("output_dir must name a folder; set it", "output_dir 须写明文件夹；请设置"), True)
    elif not held.is_dir():
        yield Lack(
            "output_dir",
            say(
                "output_dir ({output_dir}) must be a folder, and {held} is none; choose another",
                "output_dir（{output_dir}）须为文件夹，而 {held} 不是；请换一个",
                output_dir=output_dir,
                held=held,
            ),
            True,
        )
    elif not os.access(held, os.W_OK | os.X_OK):
        yield Lack(
            "output_dir",
            say(
                "output_dir ({output_dir}) must be where you may write, and {held} is not; choose another",
                "output_dir（{output_dir}）须可写入，而 {held} 不可写；请换一个",
                output_dir=output_dir,
                held=held,
            ),
            True,
        )


def _rows(setting: str, path: str, dataset_dir: str, beside: Path) -> Iterator[Lack]:
    """Nothing where a file, folder, pattern or name in dataset_info.json is meant."""
    base, _, count = path.rpartition("#")
    target = base if base and count.isdecimal() and not os.path.exists(path) else path
    parts = [target] if os.path.exists(target) else [part.strip() for part in target.split(",") if part.strip()]
    names = _named_sets(Path(dataset_dir) / INFO_FILE)
    for part in parts:
        if not os.path.exists(part) and not glob.glob(part, recursive=True) and part not in names:
            yield Lack(setting, _lacking(setting, part, beside, names), True)


def _named_sets(file: Path) -> tuple[str, ...]:
    try:
        table = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):  # opening the data says what is wrong with it
        return ()
    return tuple(table) if isinstance(table, dict) else ()


def _lacking(setting: str, path: str, beside: Path, names: tuple[str, ...] = ()) -> Text:
    """That `path` is not there, and the best remedy known: its recipe, the same path beside the
    YAML file, names of data sets.
    """
    maker = recipe_that_makes(path, beside)
    if maker is not None:
        remedy = say(
            f"it is made by `ernie-tune train {maker}`; run that first",
            f"它由 `ernie-tune train {maker}` 生成；请先运行",
        )
    elif setting == "model_name_or_path" and known_shape(path) is not None:
        name = os.path.basename(os.path.normpath(path))
        remedy = say(
            f"put the weights there, or set {setting}: baidu/{name} and download_hub: huggingface, modelscope or aistudio",
            f"请把权重放到那里，或设置 {setting}: baidu/{name} 与 download_hub: huggingface、modelscope 或 aistudio",
        )
    elif (found := _above(path, beside)) is not None:
        remedy = say(
            f"seen from {found} there is one: go there, or write {found / path}",
            f"从 {found} 看则有：请到那里运行，或写成 {found / path}",
        )
    elif names:
        remedy = say(
            f"{INFO_FILE} names {', '.join(names[:8])}; correct it", f"{INFO_FILE} 中有 {', '.join(names[:8])}；请修改"
        )
    else:
        remedy = say("correct the path", "请修改路径")
    return say(
        "{setting} ({path}) is not there, seen from {here}: {remedy}",
        "{setting}（{path}）不存在（当前文件夹为 {here}）：{remedy}",
        setting=setting,
        path=path,  # which may hold braces
        here=Path.cwd(),
        remedy=remedy,
    )


def _above(path: str, beside: Path) -> Path | None:
    """The folder from which a relative path leads to something: that of the YAML file, or one that
    holds it, as files of a repository are written from its top.
    """
    if os.path.isabs(path):
        return None
    folder = beside.resolve()
    return next((one for one in (folder, *folder.parents) if (one / path).exists()), None)


def recipe_that_makes(path: str, beside: Path = Path()) -> Path | None:
    """The YAML file nearby whose output_dir is `path` or holds it: beside the run's file, in its
    sister folders, here.
    """
    wanted = os.path.normpath(path)
    for folder in (beside, beside.parent, Path()):
        for pattern in ("*.yaml", "*/*.yaml"):
            for file in sorted(folder.glob(pattern))[:200]:
                try:
                    made = _OUTPUT.search(file.read_text(encoding="utf-8"))
                except (OSError, UnicodeDecodeError):
                    continue
                output = os.path.normpath(made.group(1).strip()) if made else ""
                if output not in ("", ".") and (wanted == output or wanted.startswith(output + os.sep)):
                    return file
    return None

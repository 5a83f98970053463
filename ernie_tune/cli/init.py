"""`ernie-tune init`: a commented YAML file and a few rows to start from.

Refuses to know: paddle, the readers of data (the rows are in the two plainest formats), the machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.convert import to_yaml
from ernie_tune.config.language import say
from ernie_tune.config.loader import Entry, Loaded, resolve, split_overrides

_COLOURS = ("red", "green", "blue")
_RECIPE = "recipe"  # where a value comes from that init chose
_QUESTION = "<image>What colour is the picture?"

# ecosystem.md 4.2: headings, and under each the settings worth seeing. Settings without effect at the chosen stage and method are left out.
_LAYOUT: dict[str, tuple[str, ...]] = {
    "### data": (
        "train_dataset_path",
        "train_dataset_type",
        "eval_dataset_path",
        "val_size",
        "max_seq_len",
        "packing",
        "image_max_pixels",
    ),
    "### model": ("model_name_or_path", "fine_tuning", "lora_rank", "lora_alpha", "lora_dropout", "freeze_config"),
    "### finetuning\n# base": (
        "stage",
        "seed",
        "output_dir",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
    ),
    "# train": ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "# loss": (
        "loss_norm",
        "loss_type",
        "beta",
        "ref_mode",
        "max_prompt_len",
        "num_generations",
        "max_completion_length",
    ),
    "# optimizer": (
        "learning_rate",
        "min_lr",
        "lr_scheduler_type",
        "warmup_ratio",
        "weight_decay",
        "moe_gate_lr_ratio",
        "vit_lr_ratio",
    ),
    "# performance": ("bf16", "recompute", "tensor_model_parallel_size", "pipeline_model_parallel_size", "sharding"),
}


def run(args: list[str]) -> int:
    """ernie-tune init [FOLDER] [key=value | --key value …]

    Writes FOLDER/run.yaml (default: this folder), every line with a comment, for the stage, model and method given, e.g.
    `ernie-tune init my_run stage=DPO fine_tuning=Full model=./my_model`. Unless train_dataset_path is given, also
    FOLDER/data/train.jsonl with a few sample rows and pictures. Overwrites nothing.
    """
    words, given = split_overrides(args)
    if len(words) > 1:
        raise UsageError(
            say(
                f"expected one folder, got {len(words)}: {' '.join(words)}",
                f"需要一个文件夹，得到 {len(words)} 个：{' '.join(words)}",
            )
        )
    folder = Path(words[0]) if words else Path(".")
    rows = folder / "data" / "train.jsonl"
    loaded = resolve([_start(folder, rows), given], "command line", for_training=True)
    sample = loaded.config.data.train_dataset_path == (rows.as_posix(),)
    lines = _sample_rows(loaded.config.model.stage) if sample else []
    for path in (folder / "run.yaml", *((rows,) if sample else ())):
        if path.exists():
            raise ValueError(
                say(
                    f"{path} exists and init overwrites nothing; name another folder or remove it",
                    f"{path} 已存在，init 不会覆盖；请换一个文件夹，或先删除它",
                )
            )
    if sample:
        _write_pictures(rows.parent / "images")
        _write(rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
    _write(folder / "run.yaml", render(loaded))
    written = folder / "run.yaml"
    more = say(f" and {rows} ({len(lines)} rows)", f" 和 {rows}（{len(lines)} 行）") if sample else ""
    print(say("wrote {file}{more}", "已写入 {file}{more}", file=written, more=more))
    for note in loaded.notes:
        if not note.startswith(_RECIPE):  # the recipe's own lines need no excuse
            print(f"note: {note}")
    print(say(f"next: ernie-tune validate {folder / 'run.yaml'}", f"下一步：ernie-tune validate {folder / 'run.yaml'}"))
    return 0


def _start(folder: Path, rows: Path) -> list[Entry]:
    """What init writes where nothing is given: the recipe of ERNIEKit's 28B files (methods.md 2.5)."""
    recipe = {
        "model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-Paddle",
        "train_dataset_path": rows.as_posix(),
        "output_dir": (folder / "output").as_posix(),
        "lora_rank": "32",
        "freeze_config": "freeze_vision",
        "gradient_accumulation_steps": "4",
        "warmup_ratio": "0.03",
        "bf16": "true",
        "recompute": "true",
    }
    return [Entry(name, value, _RECIPE) for name, value in recipe.items()]


def render(loaded: Loaded) -> str:
    """The YAML text of a configuration: the settings of the layout and all that were given, each with its help as comment."""
    config, flat = loaded.config, loaded.config.flat()
    shown = {name for names in _LAYOUT.values() for name in names}
    further = tuple(
        name for name, entry in loaded.sources.items() if name not in shown and entry.where == "command line"
    )
    lines = ["# written by `ernie-tune init`; every setting: `ernie-tune help NAME`"]
    for heading, names in {**_LAYOUT, "# given": further}.items():
        body = [
            f"{f'{name}: {to_yaml(flat[name])}':<58}  # {_comment(name)}" for name in names if _useful(config, name)
        ]
        lines += [heading, *body] if body else []
    return "\n".join(lines) + "\n"


def _useful(config: RunConfig, name: str) -> bool:
    return config.applies(SETTINGS[name].section)


def _comment(name: str) -> str:
    setting = SETTINGS[name]
    return setting.help + (f": {' | '.join(setting.choices)}" if setting.choices else "")


def _sample_rows(stage: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for colour, other in zip(_COLOURS, _COLOURS[1:] + _COLOURS[:1], strict=True):
        right, wrong = f"The picture is {colour}.", f"The picture is {other}."
        question: dict[str, Any] = {
            "messages": [{"role": "user", "content": _QUESTION}],
            "images": [f"images/{colour}.png"],
        }
        pair = {"prompt": _QUESTION, "chosen": right, "rejected": wrong, "images": question["images"]}
        ranking = {**question, "signal": {"type": "ranking", "responses": [wrong, right, colour], "order": "B>C>A"}}
        if stage == "SFT":
            rows.append({**question, "messages": [*question["messages"], {"role": "assistant", "content": right}]})
        elif stage in ("DPO", "RM"):
            rows.append(pair)
        elif stage == "KTO":
            for answer, good in ((right, "good"), (wrong, "bad")):
                rows.append({**question, "signal": {"type": "label", "response": answer, "label": good}})
        elif stage == "UPO":
            rated_answers = [{"text": right, "score": 5}, {"text": colour, "score": 3}, {"text": wrong, "score": 1}]
            rated = {"type": "rating", "responses": rated_answers}
            rows += [{**question, "signal": {"type": "pair", "chosen": right, "rejected": wrong}}]
            rows += [{**question, "signal": rated}, ranking]
        else:
            raise ValueError(
                say(
                    f"stage ({stage}) has no sample rows, only SFT, DPO, KTO, UPO and RM have; give your own "
                    "with train_dataset_path=FILE",
                    f"阶段（{stage}）没有示例数据，只有 SFT、DPO、KTO、UPO、RM 有；请用 "
                    "train_dataset_path=FILE 给出自己的数据",
                )
            )
    return rows


def _write_pictures(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for colour in _COLOURS:
        target = folder / f"{colour}.png"
        if not target.exists():
            unfinished = target.with_suffix(".tmp")
            Image.new("RGB", (56, 56), colour).save(unfinished, format="PNG")
            os.replace(unfinished, target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)

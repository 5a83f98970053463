"""`ernie-tune init`: a commented YAML file, and a few rows to start from, that train as they are on
this machine.

Where no model is named and the released one is not on this machine, the small one that comes with
the package stands in, at its own learning rate. Refuses to know: paddle, the readers of data (the
rows are in the two plainest formats).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.hub import cached
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.convert import to_yaml
from ernie_tune.config.language import say, shown
from ernie_tune.config.loader import Entry, Loaded, resolve, split_overrides
from ernie_tune.config.stages import STAGES
from ernie_tune.models.presets import PRESETS, is_fresh, shipped_name
from ernie_tune.models.specs import parameter_count
from ernie_tune.plan.judgement import judged

_COLOURS = ("red", "green", "blue")
_RECIPE = "recipe"  # where a value comes from that init chose
_QUESTIONS = ("What colour is the picture?", "Name the colour.", "Which colour do you see?", "这张图片是什么颜色？")
_RELEASED = "baidu/ERNIE-4.5-VL-28B-A3B-Paddle"
_STAND_IN = "nano"
_SMALL = 200_000_000  # parameters: a preset below it trains on any machine

# The usual headings of ERNIEKit's files, and under each the settings worth seeing. Settings without
# effect at the chosen stage and method are left out.
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
    "### model": (
        *("model_name_or_path", "download_hub", "fine_tuning", "lora_rank", "lora_alpha", "lora_dropout"),
        *("num_virtual_tokens", "adapter_width", "trainable_layers", "freeze_config"),
    ),
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
        "allow_base",
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
        "adam_beta2",
        "moe_gate_lr_ratio",
        "vit_lr_ratio",
    ),
    "# performance": ("bf16", "recompute", "tensor_model_parallel_size", "pipeline_model_parallel_size", "sharding"),
}


def run(args: list[str]) -> int:
    """ernie-tune init [FOLDER] [key=value | --key value …]

    Writes FOLDER/run.yaml (default: this folder), every line with a comment, for the stage, model
    and method given, e.g.
    `ernie-tune init my_run stage=DPO fine_tuning=Full model=./my_model`. It trains as it is, with a
    tenth of the rows held out. Unless train_dataset_path is given, also FOLDER/data/train.jsonl
    with a few sample rows and pictures. Without a model on this machine: model=nano, which comes
    with the package; fresh weights: model=tiny-a (or small, tiny-b, tiny-c). Overwrites nothing.
    """
    words, given = split_overrides(args)
    if len(words) > 1:
        raise UsageError(
            say(
                f"expected one folder, got {len(words)}: {' '.join(words)}", f"只能有一个文件夹，得到 {' '.join(words)}"
            )
        )
    folder = Path(words[0]) if words else Path(".")
    rows = folder / "data" / "train.jsonl"
    loaded = resolve([_start(folder, rows, given), given], "command line", for_training=True)
    sample = loaded.config.data.train_dataset_path == (rows.as_posix(),)
    for path in (folder / "run.yaml", *((rows,) if sample else ())):
        if path.exists():
            raise ValueError(
                say(
                    f"{path} exists and init overwrites nothing; name another folder or remove it",
                    f"{path} 已存在，init 不覆盖任何文件；请换一个文件夹或将其删除",
                )
            )
    lines = _sample_rows(loaded.config.model.stage) if sample else []
    if sample:
        _write_pictures(rows.parent / "images")
        _write(rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
    _write(folder / "run.yaml", render(loaded))
    more = say(f" and {rows} ({len(lines)} rows)", f" 与 {rows}（{len(lines)} 行）") if sample else ""
    print(say(f"wrote {folder / 'run.yaml'}{more}", f"已写入 {folder / 'run.yaml'}{more}"))
    _tell(loaded, given, folder)
    return 0


def _tell(loaded: Loaded, given: list[Entry], folder: Path) -> None:
    """Notes, and the commands that come next."""
    model = loaded.config.model
    chosen = not {"model_name_or_path", "model", "base_model", "model_id_or_path"} & {entry.name for entry in given}
    if chosen and model.model_name_or_path == _STAND_IN:
        print(
            say(
                f"note: the released 28B is not on this machine; {_STAND_IN}, a small one that comes with the package, stands in. "
                f"For the released one: model={_RELEASED} download_hub=huggingface (or modelscope, aistudio)",
                f"说明：本机没有已发布的 28B 模型，以随包附带的小模型 {_STAND_IN} 代替。使用已发布模型："
                f"model={_RELEASED} download_hub=huggingface（或 modelscope、aistudio）",
            )
        )
    for note in (*loaded.notes, *judged(loaded, "run.yaml:1", training=False)):
        if not note.startswith(_RECIPE):  # the recipe's own lines need no excuse
            print(say("note: {note}", "说明：{note}", note=shown(note)))
    output = loaded.config.save.output_dir
    last = f"ernie-tune score {output} ROWS.jsonl" if model.stage == "RM" else f"ernie-tune chat {output}"
    print(say("next:", "接下来："))
    for line in (f"ernie-tune validate {folder / 'run.yaml'}", f"ernie-tune train {folder / 'run.yaml'}", last):
        print(f"  {line}")


def _start(folder: Path, rows: Path, given: list[Entry]) -> list[Entry]:
    """What init writes where nothing is given: the recipe of ERNIEKit's 28B files, or, for a small
    model, one for any machine.
    """
    some = Entry("freeze_config", "freeze_vision", _RECIPE)  # without which Freeze is refused
    asked = resolve([[some], given], "command line").config
    name = asked.model.model_name_or_path or (_RELEASED if cached(_RELEASED) else _STAND_IN)
    stage, method = asked.model.stage, asked.model.fine_tuning
    known = PRESETS.get(shipped_name(name) or name)
    small = known is not None and parameter_count(known) < _SMALL and not Path(name).is_dir()
    recipe = {
        "model_name_or_path": name,
        "train_dataset_path": rows.as_posix(),
        "output_dir": (folder / "output").as_posix(),
        "eval_strategy": "epoch",
    }
    if not asked.data.eval_dataset_path:
        recipe["val_size"] = "0.1"
    named = {alias for entry in given for alias in (entry.name,)} & {
        "fine_tuning",
        "finetuning_type",
        "train_type",
        "lora",
    }
    if small and is_fresh(name) and not named:
        recipe["fine_tuning"] = method = "Full"  # an adapter on fresh weights has nothing to adapt
    recipe.update(_small_recipe(stage, method, is_fresh(name)) if small else _released_recipe(method))
    return [Entry(name, value, _RECIPE) for name, value in recipe.items()]


def _released_recipe(method: str) -> dict[str, str]:
    recipe = {
        "lora_rank": "32",
        "freeze_config": "freeze_vision",
        "gradient_accumulation_steps": "4",
        "warmup_ratio": "0.03",
        "bf16": "true",
        "recompute": "true",
    }
    return recipe if method == "LoRA" else {name: value for name, value in recipe.items() if name != "lora_rank"}


def _small_recipe(stage: str, method: str, fresh: bool) -> dict[str, str]:
    """Small models learn at rates of their own, router and tower as fast as the rest
    (examples/digits): all weights slower where they know something already.
    """
    rate = 5.0e-4 if method == "Full" and not fresh else 2.0e-3
    recipe = {
        "max_seq_len": "512",
        "num_train_epochs": "20",
        "per_device_train_batch_size": "8" if STAGES[stage].samples else "4",
        **({"num_generations": "4", "max_completion_length": "16"} if STAGES[stage].samples else {}),
        "learning_rate": f"{rate / 10 if STAGES[stage].compares else rate:.1e}",
        "warmup_ratio": "0.05",
        "weight_decay": "0.01",
        "adam_beta2": "0.99",
        "moe_gate_lr_ratio": "1.0",
        "vit_lr_ratio": "1.0",
        "eval_max_new_tokens": "16",
    }
    if STAGES[stage].compares:
        recipe["max_prompt_len"] = "256"
    if method == "LoRA":
        recipe["lora_rank"] = "16"
    if stage == "UPO":
        recipe["allow_base"] = "true"  # no SFT has made it; for a trial of the settings
    if method == "Freeze":
        recipe["freeze_config"] = "freeze_vision freeze_aligner"
    return recipe


def render(loaded: Loaded) -> str:
    """The YAML text of a configuration: the settings of the layout and all that were given, each
    with its help as comment.
    """
    config, flat = loaded.config, loaded.config.flat()
    shown = {name for names in _LAYOUT.values() for name in names}
    further = tuple(
        name for name, entry in loaded.sources.items() if name not in shown and entry.where == "command line"
    )
    lines = ["# written by `ernie-tune init`; a setting: `ernie-tune help NAME`; all: `ernie-tune help --all`"]
    for heading, names in {**_LAYOUT, "# given": further}.items():
        body = [
            f"{f'{name}: {to_yaml(flat[name])}':<58}  # {_comment(name)}" for name in names if _useful(config, name)
        ]
        lines += [heading, *body] if body else []
    return "\n".join(lines) + "\n"


def _useful(config: RunConfig, name: str) -> bool:
    if name in ("trainable_layers", "allow_base", "download_hub"):
        return config.reads(name) and config.flat()[name] != SETTINGS[name].default
    return config.reads(name)


def _comment(name: str) -> str:
    about = SETTINGS[name].about
    text = str(say(about.help, about.help_zh))
    return text + (f": {' | '.join(about.choices)}" if about.choices else "")


def _sample_rows(stage: str) -> list[dict[str, Any]]:
    """A few rows of what the stage learns from."""
    signals = STAGES[stage].signals
    rows: list[dict[str, Any]] = []
    for asked in _QUESTIONS:
        for colour, other in zip(_COLOURS, _COLOURS[1:] + _COLOURS[:1], strict=True):
            right, wrong = f"The picture is {colour}.", f"The picture is {other}."
            dialogue = [{"role": "user", "content": f"<image>{asked}"}]
            question: dict[str, Any] = {"messages": dialogue, "images": [f"images/{colour}.png"]}
            if "sft" in signals:
                rows.append({**question, "messages": [*dialogue, {"role": "assistant", "content": right}]})
            elif "verifiable" in signals:
                rows.append({**question, "signal": {"type": "verifiable", "answer": colour}})
            elif "pair" in signals and "label" in signals:
                rows += [{**question, "signal": signal} for signal in _signals(right, wrong, colour)]
            elif "pair" in signals:
                rows.append(
                    {"prompt": f"<image>{asked}", "chosen": right, "rejected": wrong, "images": question["images"]}
                )
            elif "label" in signals:
                for answer, good in ((right, "good"), (wrong, "bad")):
                    rows.append({**question, "signal": {"type": "label", "response": answer, "label": good}})
            else:
                raise ValueError(
                    say(
                        f"stage ({stage}) has no sample rows; give your own with train_dataset_path=FILE",
                        f"stage（{stage}）没有示例数据；请用 train_dataset_path=文件 给出自己的数据",
                    )
                )
    return rows


def _signals(right: str, wrong: str, short: str) -> list[dict[str, Any]]:
    """A pair, a rating and a ranking of the same answers."""
    rated = [{"text": right, "score": 5}, {"text": short, "score": 3}, {"text": wrong, "score": 1}]
    return [
        {"type": "pair", "chosen": right, "rejected": wrong},
        {"type": "rating", "responses": rated},
        {"type": "ranking", "responses": [wrong, right, short], "order": "B>C>A"},
    ]


def _write_pictures(folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for colour in _COLOURS:
        target = folder / f"{colour}.png"
        if not target.exists():
            drawn = io.BytesIO()
            Image.new("RGB", (56, 56), colour).save(drawn, format="PNG")
            write_atomically(target, drawn.getvalue())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)

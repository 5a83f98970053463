"""Opens an exported folder as a stranger would, in a process of its own:
`python -m ernie_tune.export.reopen JOB.json RESULT.npz`.

Reads the folder by FastDeploy's rules (or as transformers or our server would), checks files,
names, shapes, types and every value, lets Paddle's own operator quantise the experts, and computes
logits for the job's inputs. What it finds wrong are lines of text in the result, never an
exception.
Refuses to know: how the folder was written; of our code it shares the model and the grid, not the
table of names.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors import safe_open

from ernie_tune.export import fastdeploy_rules as rules
from ernie_tune.export.grid import quantize
from ernie_tune.export.packing import unpack
from ernie_tune.export.processor_rules import read_script
from ernie_tune.export.prompts import compare

Array = np.ndarray[Any, Any]
Part = tuple[str, int | None, Array]
OPERATOR_LIMIT = 64  # matrices of a large model that go through the operator; all of a small one
_SMALL_MODEL = 50_000_000  # weights


def digest(array: Array) -> int:
    """A checksum of values and their order; of bfloat16 raw bits."""
    return zlib.crc32(np.ascontiguousarray(array).data)


class _Reader:
    """All safetensors files of a folder through the library's own reader."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [safe_open(file, framework="paddle") for file in files]
        self.place = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118  no dict
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self.place.items()}
        self.types = {name: file.get_slice(name).get_dtype() for name, file in self.place.items()}

    def read(self, name: str) -> Array:
        return self.place[name].get_tensor(name).numpy()


def check_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """What is missing beside the weights."""
    problems = []
    if not any((folder / name).is_file() for name in rules.TOKENIZER_MODELS):
        problems.append(f"none of {', '.join(rules.TOKENIZER_MODELS)} is there: FastDeploy has no tokenizer")
    required = (*rules.REQUIRED_FILES, *(rules.VISION_FILES if config.get("vision_config") else ()))
    problems += [f"{name} is missing" for name in required if not (folder / name).is_file()]
    if problems:
        return problems
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))
    if not template and not settings.get("chat_template"):
        problems.append("no chat template: tokenizer_config.json must hold chat_template")
    if config.get("vision_config"):
        text = (folder / "added_tokens.json").read_text(encoding="utf-8") + json.dumps(settings, ensure_ascii=False)
        models = [folder / name for name in rules.TOKENIZER_MODELS if (folder / name).is_file()]
        held = models[0].read_bytes()
        problems += [
            f"the tokenizer lacks {token}"
            for token in rules.VISION_TOKENS
            if token not in text and token.encode() not in held
        ]
        if config.get("temporal_conv_size", 2) != 2:
            problems.append(f"temporal_conv_size ({config['temporal_conv_size']}) must be 2")
    return problems


def open_by_rules(folder: Path, job: dict[str, Any], problems: list[str]) -> Iterator[Part]:
    """The folder as FastDeploy reads it: (canonical name, expert, stored values). Problems are
    added while it is read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    problems += check_files(folder, config)
    reader = _Reader(rules.weight_files(folder))
    plan = rules.quantisation(config, read_script(folder)[0].get("--quantization", ""))
    if plan.on_disk:
        where = "--quantization" if config.get("quantization_config") is None else "quantization_config"
        cure = 'add "is_quantized": false' if where == "--quantization" else "remove it"
        problems.append(f"{where} makes FastDeploy take the weights for quantised; {cure}")
    elif [plan.dense, plan.text_experts, plan.vision_experts] != job["types"] and "quantization_config" not in config:
        problems.append(f"serve.sh must pass --quantization for {job['types']}, but FastDeploy would make {plan} of it")
    if config.get("quantization_config") is not None and not plan.on_disk:
        problems.append("quantization_config in config.json wins over the command line; remove it")
    view = rules.Folder(config, reader.shapes, reader.read)
    view.check_names()
    problems += view.silent
    for parameter in rules.parameters(config):
        wanted = "F32" if parameter.float32 else job["code"]
        for piece in parameter.pieces:
            name = next((n for n in piece.names if n in reader.types), None)
            if name and reader.types[name] != wanted:
                problems.append(f"{name} ({reader.types[name]}) must be stored as {wanted}")
        yield from rules.canonical_parts(parameter.name, view.load(parameter), config)


def open_as_transformers(folder: Path, job: dict[str, Any], problems: list[str]) -> Iterator[Part]:
    """The folder by our own table, for layouts that FastDeploy does not read."""
    from ernie_tune.export.source import ExportSource, stored_places

    problems += [f"{name} is missing" for name in rules.REQUIRED_FILES if not (folder / name).is_file()]
    source = ExportSource(folder)
    if source.table.flavour != job["flavour"]:
        problems.append(f"weights are in layout {source.table.flavour!r}, not {job['flavour']!r}")
    for name, expert, float32 in stored_places(source.config):
        yield name, expert, source.read(name, expert, "F32" if float32 else job["code"])


def open_packed(folder: Path, job: dict[str, Any], problems: list[str]) -> Any:
    """The model of a packed folder."""
    from ernie_tune.peft.packed import load_packed

    problems += [f"{name} is missing" for name in rules.REQUIRED_FILES if not (folder / name).is_file()]
    return load_packed(folder)


def operator_codes(bits_KN: Array, bits: int, shards: int) -> tuple[Array, Array]:
    """Codes and scales from `paddle.nn.quant.weight_quantize`, shard by shard. Rows of zeros fill K
    up to a multiple of 64: they change no scale.
    """
    from paddle.nn.quant import weight_quantize

    share = len(bits_KN) // shards
    codes, scales = [], []
    for s in range(shards):
        part = bits_KN[s * share : (s + 1) * share]
        full = np.concatenate([part, np.zeros((-share % 64, part.shape[1]), np.uint16)])
        wide = np.pad(full, ((0, 0), (0, -full.shape[1] % 16)))
        tensor = paddle.to_tensor((wide.astype(np.uint32) << 16).view(np.float32)).astype("bfloat16")
        packed, scale = weight_quantize(tensor, f"weight_only_int{bits}", arch=80)
        codes.append(unpack(packed.numpy(), bits)[:share, : part.shape[1]])
        scales.append(scale.astype("float32").numpy()[: part.shape[1]])
    return np.concatenate(codes), np.stack(scales)


class _Check:
    """Compares every part with the digests of the job, and experts with the planned codes through
    Paddle's operator.
    """

    def __init__(self, job: dict[str, Any], problems: list[str]) -> None:
        self.job, self.problems = job, problems
        self.left = dict(job["digests"])
        self.operated = self.wrong_codes = 0
        total = int(job["weights"])
        coded = sum(1 for key in job["codes"])
        self.every = 1 if total <= _SMALL_MODEL else max(1, coded // OPERATOR_LIMIT)
        self.seen = 0

    def part(self, name: str, expert: int | None, array: Array) -> None:
        key = f"{name}|{'' if expert is None else expert}"
        wanted = self.left.pop(key, None)
        if not self.job["digests"]:
            return
        if wanted is None:
            self.problems.append(f"{name} is no parameter of the model that was exported")
        elif digest(array) != wanted:
            turned = array.ndim == 2 and digest(array.T) == wanted
            what = f"expert {expert} of {name}" if expert is not None else name
            self.problems.append(
                f"{what} holds other values than the model that was exported" + (": it is transposed" if turned else "")
            )
        if key in self.job["codes"]:
            self.seen += 1
            if self.seen % self.every == 0:
                self._operate(name, expert, array, *self.job["codes"][key])

    def _operate(
        self, name: str, expert: int | None, array: Array, bits: int, shards: int, planned: int, scales: int
    ) -> None:
        """V1: the operator finds the planned codes and scales in the written weights."""
        self.operated += 1
        codes, scale = operator_codes(np.ascontiguousarray(array), bits, shards)
        codes[:, (scale == 0).any(0)] = 0
        if digest(codes) != planned or digest(scale) != scales:
            self.wrong_codes += 1
            self.problems.append(
                f"weight_quantize finds other codes than planned in {name} {'' if expert is None else expert}".rstrip()
            )

    def finish(self) -> None:
        self.problems += [f"{key.split('|')[0]} is nowhere in the folder" for key in self.left]


def served(array: Array, bits: int, shards: int) -> Array:
    """What FastDeploy multiplies with after quantising a stored matrix itself, float32."""
    if array.dtype == np.uint16:
        return quantize(array, bits, shards).dense() if bits else (array.astype(np.uint32) << 16).view(np.float32)
    return array


def build(parts: Iterator[Part], check: _Check, job: dict[str, Any], folder: Path) -> Any:
    """A float32 model of the parts, quantised as the server would."""
    from ernie_tune.checkpoint.auto import AutoConfig
    from ernie_tune.models.ernie import ErnieModel

    model = ErnieModel(AutoConfig.from_pretrained(folder)) if job["inputs"] else None
    state = model.state_dict() if model else {}
    stacks: dict[str, list[Array]] = {}
    for name, expert, array in parts:
        check.part(name, expert, array)
        if name not in state:
            continue
        bits, shards = job["bits"].get(name, (0, 1))
        value = served(np.ascontiguousarray(array), bits, shards)
        if expert is None:
            state[name].set_value(value.reshape(state[name].shape))
            continue
        stacks.setdefault(name, []).append(value)
        if len(stacks[name]) == state[name].shape[0]:
            state[name].set_value(np.stack(stacks.pop(name)))
    return model


def main(job_file: str, result_file: str) -> int:
    """Run the job; the result holds `report` (JSON) and the logits of each input, `logits_0` ..."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    folder, problems = Path(job["folder"]), []  # type: tuple[Path, list[str]]
    check, logits, model, differences = _Check(job, problems), [], None, list[str]()
    opened: dict[str, Callable[..., Iterator[Part]]] = {
        "fastdeploy": open_by_rules,
        "transformers": open_as_transformers,
    }
    try:
        if job["reader"] == "packed":
            model = open_packed(folder, job, problems)
        else:
            model = build(opened[job["reader"]](folder, job, problems), check, job, folder)
            check.finish()
            if job["served"]:
                differences = compare(folder, job["served"], problems)
    except (ValueError, OSError, KeyError) as error:
        problems.append(str(error))
    if model is not None and not problems:
        logits = [_logits(model, Path(file)) for file in job["inputs"]]
    report = {"problems": problems[:50], "operated": check.operated, "wrong_codes": check.wrong_codes}
    report["differences"] = differences
    arrays: dict[str, Any] = {f"logits_{i}": x for i, x in enumerate(logits)}
    np.savez(result_file, report=json.dumps(report), **arrays)
    return 0


def _logits(model: Any, file: Path) -> Array:
    from ernie_tune.export.measure import load_inputs

    inputs, rows = load_inputs(file)
    model.eval()
    with paddle.no_grad():
        hidden = paddle.gather(model(inputs), paddle.to_tensor(rows))
        return model.logits(hidden).astype("float32").numpy()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

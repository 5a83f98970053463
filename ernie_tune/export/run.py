"""`export`: from a model folder and its adapters to a folder that serves, checked before it gets
its name.

The steps, in order: read lazily (`source`), measure on calibration rows (`calibrate`), choose codes
(`choose`), write beside the target (`checkpoint/ writer`), check (`verify`), describe (`files`),
rename. Nothing is held but two tensors, unless data are given or the checks compare whole models.
Refuses to know: training, servers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ernie_tune import __version__
from ernie_tune.checkpoint.hub import resolve
from ernie_tune.checkpoint.lock import locked
from ernie_tune.checkpoint.names import FLAVOURS, layout
from ernie_tune.checkpoint.writer import DEFAULT_SHARD_BYTES, TwoBuffers, write_folder
from ernie_tune.config.fastdeploy import FastDeployCommand
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.data.templates import RELEASED, TRANSFORMERS
from ernie_tune.data.tokenizer import VIDEO, folder_with_tokenizer
from ernie_tune.export import files, verify
from ernie_tune.export.at_load import AtLoad
from ernie_tune.export.awq import Folded, folded_moments
from ernie_tune.export.cache import check_caches, write_cache
from ernie_tune.export.calibrate import moments, samples
from ernie_tune.export.choose import Chosen, Moment, Served, Written
from ernie_tune.export.measure import (
    Look,
    Probe,
    distance,
    look,
    made_up_probes,
    model_of,
    probes_of,
    read_batches,
    set_weights,
)
from ernie_tune.export.options import LAYOUTS, ExportOptions
from ernie_tune.export.packed import write_packed
from ernie_tune.export.processor_rules import CHECKED, vocabulary_findings
from ernie_tune.export.scheme import bits_of, kernel_problems, quantised_names, scheme
from ernie_tune.export.served import media_arguments
from ernie_tune.export.source import EXPORT_CODE, ExportSource, Place, Rounded, Weights, is_adapter
from ernie_tune.export.transformers_files import write_files
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.config_dialects import write_config
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.model import PeftModel

Score = Callable[[ErnieModel, Processor], Mapping[str, float]]
_MERGE_KL = 0.02  # what rounding to bfloat16 may cost, in nats; a wrong merge costs whole ones


def export(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    score: Score | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write the model in `folders` (a model folder, then adapters; or one adapter, whose base is
    named in its settings) to `output_dir`.

    `options`: the fields of `ExportOptions`. `score(model, processor)`: scores of a task, taken
    before and after quantisation. Returns what export_report.json holds. Raises ValueError where an
    input is wrong or a check fails (the folder is then not written), FileNotFoundError for folders
    that are not there.
    """
    return _Export(
        [folders] if isinstance(folders, str | os.PathLike) else folders,
        Path(output_dir),
        ExportOptions(**options),
        score,
    ).run()


def sources(folders: Sequence[str | os.PathLike[str]]) -> tuple[Path, list[Path]]:
    """The base model's folder and the adapters' of a command line. ValueError for none, an unknown
    base, and a second model.
    """
    if not folders:
        raise ValueError(
            say(
                "folders (none) must name a model folder, or an adapter; give at least one",
                "没有给出文件夹；请至少给出一个模型文件夹或适配器",
            )
        )
    paths = [resolve(folder) for folder in folders]
    if not is_adapter(paths[0]):
        base, adapters = paths[0], paths[1:]
    else:
        adapters = paths
        base = _base_of(paths[0])
    others = [str(path) for path in adapters if not is_adapter(path)]
    if others:
        raise ValueError(
            say(
                f"{others[0]} must be an adapter (adapter_config.json or lora_config.json), since {base} "
                "is the model; give one model only",
                f"{base} 已是模型，{others[0]} 须为适配器（adapter_config.json 或 lora_config.json）；只能给出一个模型",
            )
        )
    return base, adapters


def _base_of(adapter: Path) -> Path:
    file = next(adapter / name for name in ("adapter_config.json", "lora_config.json") if (adapter / name).is_file())
    name = read_json_object(file).get("base_model_name_or_path") or ""
    try:
        return resolve(name)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            say(
                f"{file}: base_model_name_or_path ({name!r}) must be a folder of weights; give it first: "
                f"ernie-tune export BASE {adapter} ...",
                f"{file}：base_model_name_or_path（{name!r}）须为权重文件夹；请先给出底座：ernie-tune "
                f"export BASE {adapter} ...",
            )
        ) from error


class _Export:
    """One export from start to end."""

    def __init__(self, folders: Sequence[Any], target: Path, options: ExportOptions, score: Score | None) -> None:
        self.base, self.adapters = sources(folders)
        self.target, self.o, self.score = target.resolve(), options, score
        self.scheme = scheme(options.quantization)
        self.source = ExportSource(self.base, self.adapters)
        self.config = self.source.config
        self.processor = Processor.from_pretrained(self._processor_folder())
        self.processor.sees = self.config.vision is not None
        self.staged = self.target.with_name(self.target.name + ".exporting")
        self.full = options.verify == "full"
        self.probes: list[Probe] = []
        self.notes: list[str] = []
        self.unservable: list[str] = []  # layers that FastDeploy's kernels cannot multiply with
        self.checks: dict[str, Any] = {}
        self.table = ""
        _check_target(self.target, self.base, self.adapters)

    def _processor_folder(self) -> Path:
        """The last folder with a tokenizer: training saves one beside an adapter."""
        for folder in map(folder_with_tokenizer, (*reversed(self.adapters), self.base)):
            if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
                return folder
        raise ValueError(
            say(
                f"{self.base} must hold tokenizer.model: without it nothing can serve the model; copy the "
                "tokenizer files of the release there",
                f"{self.base} 中须有 tokenizer.model，否则无法部署该模型；请将发布的分词器文件复制到那里",
            )
        )

    def run(self) -> dict[str, Any]:
        with locked(self.target, "export", file=self.staged.with_name(self.staged.name + ".lock")):
            return self._run()

    def _run(self) -> dict[str, Any]:
        start = time.monotonic()
        _clear(self.staged)
        try:
            weights, chosen, planned = self._choose()
            written = self._write(weights, chosen)
            shell = self._write_script()
            self._verify(weights, chosen, planned)
            report = self._describe(shell, written, time.monotonic() - start)
            _publish(self.staged, self.target)
        finally:
            for folder in (self.staged, self.staged.with_name(self.staged.name + ".tmp")):
                shutil.rmtree(folder, ignore_errors=True)
        return report

    # --- choosing ---------------------------------------------------------------------------------

    def _choose(self) -> tuple[Weights, Chosen | AtLoad | None, Look | None]:
        """The weights to quantise, their codes, and what the served model does on the probes."""
        o, weights = self.o, self.source  # type: ExportOptions, Weights
        quantised = o.quantization != "none"
        problems = kernel_problems(self.config, self.scheme, o.target_tp) if quantised and o.emit != "packed" else []
        self.unservable = list(problems)
        if problems:
            self.notes.append(
                "FastDeploy's kernels need rows in 64s and columns in 16s on every rank, so they cannot multiply "
                "with this model's "
                f"{'; '.join(problems)}. `ernie-tune export --emit packed` makes a folder for our own server."
            )
        if not self.full and not o.calib:
            return weights, self._codes(weights) if quantised else None, None
        calib, self.probes = self._data()
        model = model_of(Rounded(weights))
        before = look(model, self.probes)
        if self.adapters and self.full:
            self._check_merge(before)
        if not quantised:
            return weights, None, before
        names = [name for name in quantised_names(self.config, self.scheme) if bits_of(name, self.scheme) == 4]
        seen = moments(model, [b.inputs for b in calib], names, full=o.method == "gptq") if calib else {}
        if o.awq:
            folded = Folded.of(weights, seen, o.awq)
            weights, seen = folded, folded_moments(seen, folded)
            set_weights(model, Rounded(weights))
            self._check_fold(before, look(model, self.probes))
        chosen = self._codes(weights, seen)
        if not self.full:
            return weights, chosen, None
        return weights, chosen, self._compare(model, chosen, before)

    def _codes(self, weights: Weights, seen: Mapping[Place, Moment] | None = None) -> Chosen | AtLoad:
        o = self.o
        return (
            AtLoad(weights, o.quantization)
            if o.at_load
            else Chosen(weights, self.scheme, o.method, o.target_tp, seen or {})
        )

    def _check_fold(self, before: Look, after: Look) -> None:
        """Powers of two change nothing before quantisation; sums may be taken in another order."""
        self.checks["awq"] = distance(before, after)
        if not self.checks["awq"]["max_difference"] <= verify.LOGIT_TOLERANCE:
            raise ValueError(
                say(
                    "awq must leave the logits as they are, but they moved by "
                    f"{self.checks['awq']['max_difference']:.2e}; leave awq out and report this",
                    f"awq 不应改变 logits，但它们变动了 {self.checks['awq']['max_difference']:.2e}；请不用 awq，并报告此问题",
                )
            )

    def _data(self) -> tuple[list[Any], list[Probe]]:
        """Calibration batches, and held-out probes: rows of `eval`, else every fourth batch of
        `calib`, else made-up inputs that nothing is scored on.
        """
        o = self.o
        calib = read_batches(o.calib, self.processor, o.calib_rows, parts=8) if o.calib else []
        if o.eval:
            return calib, probes_of(read_batches(o.eval, self.processor, o.calib_rows))
        if len(calib) >= 4:
            return [b for i, b in enumerate(calib) if i % 4 != 3], probes_of(calib[3::4])
        return calib, made_up_probes(self.processor, self.config.vision is not None)

    def _check_merge(self, merged: Look) -> None:
        """The merged weights must do what the adapters do beside the model."""
        from ernie_tune.checkpoint.auto import AutoModel

        model: ErnieModel = AutoModel.from_pretrained(self.base, dtype="float32")
        for adapter in self.adapters:
            model = PeftModel.from_pretrained(model.merge()[0] if isinstance(model, PeftModel) else model, adapter)
        model.eval()
        found = distance(look(model, self.probes), merged)
        self.checks["merge"] = found
        print(
            say(
                f"ernie_tune: merged {len(self.adapters)} adapter(s) in float32, rounded to bfloat16: "
                f"largest difference of a log-probability {found['max_difference']:.2e}, KL "
                f"{found['kl']:.2e}, same first choice {found['top1']:.2%}",
                f"ernie_tune：已在 float32 下合并 {len(self.adapters)} 个适配器并舍入为 "
                f"bfloat16：对数概率最大差 {found['max_difference']:.2e}，KL {found['kl']:.2e}，首选一致 "
                f"{found['top1']:.2%}",
            ),
            file=sys.stderr,
            flush=True,
        )
        if not found["kl"] <= _MERGE_KL:
            raise ValueError(
                say(
                    f"merged model must do what base and adapter do (KL {found['kl']:.3g}, at most "
                    f"{_MERGE_KL:g}); nothing was written: report this",
                    f"合并后的模型须与底座加适配器一致（KL {found['kl']:.3g}，至多 {_MERGE_KL:g}"
                    "）；没有写出任何文件：请报告此问题",
                )
            )

    def _compare(self, model: ErnieModel, chosen: Chosen | AtLoad, before: Look) -> Look:
        """V3 to V5: three sets of weights through one model, one after the other."""
        inputs = samples(model, [p.inputs for p in self.probes], quantised_names(self.config, self.scheme))
        errors = verify.layer_errors(chosen, inputs)
        scores, looks = [], []
        if self.score:
            scores.append(dict(self.score(model, self.processor)))
        for weights in (Served(chosen, plain=True), Served(chosen)):
            set_weights(model, weights)
            looks.append(look(model, self.probes))
            if self.score:
                scores.append(dict(self.score(model, self.processor)))
        rtn, ours = (distance(before, one) for one in looks)
        self.table = verify.table(errors, ours, rtn, scores)
        self.checks |= {"layer_errors": asdict(errors), "ours": ours, "rtn": rtn}
        if scores:
            self.checks["scores"] = dict(zip(("before", "rtn", "ours"), scores, strict=True))
            self.notes += verify.score_notes(scores)
        print(self.table, file=sys.stderr, flush=True)
        reasons = verify.gate(errors, ours, rtn, 4 if 4 in (*self.scheme.experts, self.scheme.dense) else 8)
        if reasons:
            raise ValueError(
                "exported model must pass its checks, but\n  " + "\n  ".join(reasons) + "\nnothing was written"
            )
        return looks[1]

    # --- writing and checking ---------------------------------------------------------------------

    def _write(self, weights: Weights, chosen: Chosen | AtLoad | None) -> dict[str, float]:
        start, o = time.monotonic(), self.o
        if o.emit == "packed" and chosen:
            codes = (chosen.scale_code, self.source.float_code) if isinstance(chosen, AtLoad) else ()
            write_packed(self.staged, weights, chosen.bits, chosen.shards, chosen.grid, o.max_shard_bytes, *codes)
        elif not isinstance(chosen, AtLoad):
            told = self._hf_config() if o.layout == "hf" else None
            write_layout(
                self.staged, Written(chosen) if chosen else weights, LAYOUTS[o.layout], o.max_shard_bytes, told
            )
        seconds = time.monotonic() - start
        size = sum(path.stat().st_size for path in self.staged.glob("*.safetensors"))
        if o.emit == "cache" and isinstance(chosen, Chosen):
            write_cache(self.staged, chosen)
        searched = TRANSFORMERS if o.layout == "hf" else RELEASED
        for change in files.copy_files([*reversed(self.adapters), self.base], self.staged, self.processor, searched):
            print(f"ernie_tune: {change}", file=sys.stderr, flush=True)
            if o.layout != "hf":  # there it is the ordinary way of any model
                self.notes.append(change)
        if o.layout == "hf" and self.config.vision is not None:
            write_files(self.staged, [*reversed(self.adapters), self.base], self.processor)
        return {"weight_bytes": size, "write_seconds": seconds}

    def _hf_config(self) -> ModelConfig:
        """The config that transformers needs: it tells videos from images by the id of the
        placeholder.
        """
        config, tokens = self.config, self.config.tokens
        video = self.processor.tokenizer.special.get(VIDEO)
        if config.vision is None or (video is None and tokens.video != tokens.image):
            return config
        if video is None:
            self.notes.append(
                "The tokenizer has one placeholder for images and videos, transformers tells them apart by two "
                f"({VIDEO}): there this folder reads images only."
            )
        return config.replace(tokens=dataclasses.replace(tokens, video=tokens.video if video is None else video))

    def _verify(self, weights: Weights, chosen: Chosen | AtLoad | None, planned: Look | None) -> None:
        o = self.o
        reader = "packed" if o.emit == "packed" else "transformers" if o.layout == "hf" else "fastdeploy"
        opened = verify.reopen(
            self.staged,
            reader,
            Written(chosen) if isinstance(chosen, Chosen) else weights,
            chosen,
            flavour=LAYOUTS[o.layout],
            probes=self.probes if planned else (),
            digests=reader != "packed",
            processor=self.processor,
            source=self._processor_folder(),
        )
        self.notes += opened.differences
        if o.emit == "cache" and isinstance(chosen, Chosen):
            opened.problems.extend(check_caches(self.staged, chosen))
        self.checks |= verify.check_opened(opened, planned)

    def _write_script(self) -> str:
        """serve.sh, into the staged folder, and what cannot be told a server into the notes.
        Returns the command.
        """
        o, command = self.o, None
        if o.emit != "packed" and o.layout != "hf":
            for found in vocabulary_findings(self._processor_folder()):
                print(f"ernie_tune: {found}", file=sys.stderr, flush=True)
                self.notes.append(found)
            told, untold = media_arguments(self.processor.images, self.processor.videos)
            self.notes += untold if self.config.vision is not None else []
            command = FastDeployCommand(
                str(self.target),
                port=o.port,
                tensor_parallel_size=o.target_tp,
                quantization=self.scheme.argument,
                max_model_len=min(32768, self.config.max_position_embeddings),
                vision=self.config.vision is not None,
                mm_processor=told,
                cached=o.emit == "cache",
            )
        script = self.staged / files.SCRIPT
        script.write_text(files.serve_script(command), encoding="utf-8")
        script.chmod(0o755)
        return command.shell() if command else f"ernie-tune serve {self.target}"

    def _describe(self, shell: str, written: Mapping[str, float], seconds: float) -> dict[str, Any]:
        """Card and report, into the staged folder."""
        o = self.o
        report: dict[str, Any] = {
            "base": str(self.base),
            "adapters": [str(path) for path in self.adapters],
            "layout": "packed" if o.emit == "packed" else o.layout,
            "quantization": o.quantization,
            "method": o.method if 4 in self.scheme.experts else "rtn" if o.quantization != "none" else "none",
            **{
                key: value
                for key, value in asdict(o).items()
                if key in ("calib", "eval", "calib_rows", "target_tp", "emit", "awq", "verify")
            },
            "command": shell,
            "checks": self.checks,
            "checked_against": CHECKED,
            "table": self.table,
            "notes": self.notes,
            "unservable": self.unservable,
            "replaced": (self.target / files.REPORT).is_file(),
            **written,
            "seconds": seconds,
            "versions": {"ernie_tune": __version__, **_versions()},
        }
        existing = next(
            (f / files.CARD for f in (*reversed(self.adapters), self.base) if (f / files.CARD).is_file()), None
        )
        text = existing.read_text(encoding="utf-8") if existing else ""
        (self.staged / files.CARD).write_text(files.card(text, self.target.name, report, shell), encoding="utf-8")
        report["sha256"] = files.hashes(self.staged)
        (self.staged / files.REPORT).write_text(
            json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return report


def _versions() -> dict[str, str]:
    found = {}
    for name in ("paddlepaddle", "paddlepaddle-gpu", "numpy", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_layout(
    folder: Path,
    weights: Weights,
    flavour: str,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    config: ModelConfig | None = None,
) -> list[Path]:
    """Weights, bfloat16 but for routers and their biases, and config.json (of `config`, else of the
    weights) in one of `names.FLAVOURS`.

    Two tensors are in memory: one that is made, one that is being written. Returns the paths.
    """
    buffers = TwoBuffers()
    # halves of one matrix follow each other: it is made once
    read = functools.lru_cache(1)(weights.read)
    table = layout(weights.config, flavour)
    codes = {name: "F32" if spec.float32 else EXPORT_CODE for name, spec in table.disk.items()}
    settings = write_config((config or weights.config).replace(dtype="bfloat16"), FLAVOURS[flavour].dialect)
    return write_folder(
        folder,
        {name: (spec.shape, codes[name]) for name, spec in table.disk.items()},
        lambda disk: table.to_disk(disk, lambda name, expert: read(name, expert, codes[disk]), buffers.empty),
        max_shard_bytes=max_shard_bytes,
        metadata={"format": "pt" if FLAVOURS[flavour].torch else "np", "layout": flavour},
        files={"config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n"},
    )


def _check_target(target: Path, base: Path, adapters: Sequence[Path]) -> None:
    """The target must be new, or an earlier export: nothing else is ever replaced."""
    inputs = [path.resolve() for path in (base, *adapters)]
    if target in inputs:
        raise ValueError(
            say(
                f"output_dir ({target}) must not be one of the folders that are read; choose another",
                f"output_dir（{target}）不能是被读取的文件夹之一；请换一个",
            )
        )
    if target.exists() and not ((target / files.REPORT).is_file() or (target.is_dir() and not any(target.iterdir()))):
        raise ValueError(
            say(
                f"output_dir ({target}) must be new, empty, or an earlier export ({files.REPORT}); choose "
                "another, or move it away",
                f"output_dir（{target}）须为新的、空的或此前的导出（{files.REPORT}）；请换一个，或先移走",
            )
        )


def _clear(staged: Path) -> None:
    """Remove what an interrupted export left; a folder with subfolders that are not its own is
    somebody's and stays.
    """
    if staged.exists():
        foreign = [path.name for path in staged.iterdir() if path.is_dir() and path.name != ".cache"]
        if foreign or not (staged / "config.json").is_file():
            raise ValueError(
                say(
                    f"{staged} must be free for the unfinished export, but holds something else; move it away",
                    f"{staged} 须留空以存放未完成的导出，其中已有别的内容；请移走",
                )
            )
        shutil.rmtree(staged)


def _publish(staged: Path, target: Path) -> None:
    """The finished folder gets its name; an earlier export goes when the new one is there."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(staged, target)
    shutil.rmtree(old, ignore_errors=True)

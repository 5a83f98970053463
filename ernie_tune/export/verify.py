"""The checks that an export must pass before its folder gets its name: V0
structure and values, V1 and V2 codes, V3 outputs of layers, V4 logits and routers, V5 perplexity
and scores.

V0 to V2 run in a fresh process on the files (`reopen.py`), which also computes logits there; V3 to
V5 compare three models here: the weights before quantisation, FastDeploy's own rounding of them,
and ours. Refuses to know: how weights were made, where the folder will lie.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.export import prompts
from ernie_tune.export.at_load import AtLoad
from ernie_tune.export.choose import Chosen
from ernie_tune.export.measure import Look, Probe, log_softmax, save_inputs
from ernie_tune.export.reopen import digest
from ernie_tune.export.scheme import CLASSES, class_of
from ernie_tune.export.source import EXPORT_CODE, Place, Weights, stored_places
from ernie_tune.models.specs import parameter_count

Array = np.ndarray[Any, Any]
REOPEN_SECONDS = 3 * 3600
# the same weights in the same float32 code; sums may be taken in another order
LOGIT_TOLERANCE = 1e-3
# largest growth of perplexity: of wint8 and of anything with int4
PERPLEXITY_GATE = {8: 0.005, 4: 0.03}
_NOISE = 1.005  # a perplexity this close to the unquantised one is not called worse than rtn's


@dataclass(frozen=True)
class Opened:
    """What the fresh process said of a folder: problems, how many matrices went through Paddle's
    operator, logits of each probe.
    """

    problems: list[str]
    operated: int
    logits: list[Array]
    # of prompts, where the template is another author's
    differences: list[str] = field(default_factory=list)


def reopen(
    folder: Path,
    reader: str,
    weights: Weights,
    chosen: Chosen | AtLoad | None,
    *,
    flavour: str = "",
    probes: Sequence[Probe] = (),
    digests: bool = True,
    processor: Processor | None = None,
    source: Path | None = None,
) -> Opened:
    """Open `folder` in a process of its own and compare it with `weights`, what was to be written.
    `reader`: "fastdeploy", "transformers", "packed".

    `processor`, with which the model was trained, and `source`, the folder of its files: prompts
    are compared too, where FastDeploy reads the folder.
    Raises RuntimeError where that process dies: Paddle's operator is known to bring processes down.
    """
    s = chosen.scheme if chosen else None
    job: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "reader": reader,
        "flavour": flavour,
        "types": [f"wint{bits}" if bits else "" for bits in ((s.dense, *s.experts) if s else (0, 0, 0))],
        "served": None,
        "code": EXPORT_CODE,
        "weights": parameter_count(weights.config),
        "digests": {},
        "bits": {},
        "codes": {},
        "inputs": [],
    }
    for name, expert, float32 in stored_places(weights.config) if digests else ():
        key = f"{name}|{'' if expert is None else expert}"
        job["digests"][key] = digest(weights.read(name, expert, "F32" if float32 else EXPORT_CODE))
        if chosen is None or reader != "fastdeploy" or not chosen.bits(name):
            continue
        bits, shards = chosen.bits(name), chosen.shards(name)
        job["bits"][name] = (bits, shards)
        if bits == 4:
            made = chosen.grid(name, expert)
            job["codes"][key] = (bits, shards, digest(made.codes_KN), digest(made.scale_SN))
    with TemporaryDirectory() as place:
        for i, probe in enumerate(probes):
            save_inputs(Path(place) / f"inputs_{i}.npz", probe)
            job["inputs"].append(str(Path(place) / f"inputs_{i}.npz"))
        if processor and source and reader == "fastdeploy":
            job["served"] = prompts.job(processor, source, folder, weights.config.vision is not None, Path(place))
        file, result = Path(place) / "job.json", Path(place) / "result.npz"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "ernie_tune.export.reopen", str(file), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=REOPEN_SECONDS, check=False)
        if done.returncode or not result.is_file():
            raise RuntimeError(
                say(
                    f"the process that checks {folder} ended with {done.returncode}: {done.stderr.strip()[-2000:]}",
                    f"检查 {folder} 的进程以 {done.returncode} 结束：{done.stderr.strip()[-2000:]}",
                )
            )
        with np.load(result) as z:
            report = json.loads(str(z["report"]))
            logits = [z[f"logits_{i}"] for i in range(len(z.files) - 1)]
    return Opened(report["problems"], report["operated"], logits, report["differences"])


def check_opened(opened: Opened, planned: Look | None) -> dict[str, Any]:
    """V0 to V2, and that the folder computes what was planned. ValueError naming what is wrong."""
    if opened.problems:
        shown = "\n  ".join(opened.problems[:20])
        raise ValueError(
            say(
                f"exported folder must load as it was planned, but\n  {shown}\nnothing was written; if the "
                "inputs are sound, report this",
                f"导出的文件夹须能按计划加载，但\n  {shown}\n没有写出任何文件；若输入无误，请报告此问题",
            )
        )
    out: dict[str, Any] = {"files_names_shapes_values": "equal", "matrices_through_weight_quantize": opened.operated}
    if planned is not None and opened.logits:
        pairs = zip(opened.logits, planned.logp, strict=True)
        out["reopened_max_difference"] = max(float(np.abs(log_softmax(a) - b).max()) for a, b in pairs)
        if not out["reopened_max_difference"] <= LOGIT_TOLERANCE:
            raise ValueError(
                say(
                    "logits of the reopened folder must equal those that were planned, but differ by "
                    f"{out['reopened_max_difference']:.2e} (tolerance {LOGIT_TOLERANCE:g}); nothing was "
                    "written: report this",
                    f"重新打开的文件夹与计划的 logit 相差 {out['reopened_max_difference']:.2e}（容差 "
                    f"{LOGIT_TOLERANCE:g}）；没有写出任何文件：请报告此问题",
                )
            )
    return out


@dataclass
class LayerErrors:
    """V3: squared errors of outputs x (W - W'), summed over all matrices of a class, over the
    squared outputs. `layers`: (ours, rtn) by parameter.
    """

    ours: dict[str, float] = field(default_factory=dict)
    rtn: dict[str, float] = field(default_factory=dict)
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)

    def worse(self) -> list[str]:
        return [name for name in self.ours if self.ours[name] > self.rtn[name] * (1 + 1e-6)]


def layer_errors(chosen: Chosen | AtLoad, inputs: Mapping[Place, Array]) -> LayerErrors:
    """Relative output error of each class of layers on held-out inputs, for the chosen codes and
    for rtn's.
    """
    sums = {name: np.zeros(3) for name in CLASSES}
    layers: dict[str, Array] = {}
    for (name, expert), x_TK in inputs.items():
        weight = np.asarray(chosen.weights.read(name, expert, "F32"))
        ours, plain = chosen.grid(name, expert).dense(), chosen.rtn(name, expert).dense()
        outputs = (x_TK @ weight, x_TK @ (ours - weight), x_TK @ (plain - weight))
        squares = np.array([float(np.square(y).sum()) for y in outputs])
        sums[class_of(name)] += squares
        layers[name] = layers.get(name, 0) + squares
    found = {name: s for name, s in sums.items() if s[0] > 0}
    return LayerErrors(
        {name: s[1] / s[0] for name, s in found.items()},
        {name: s[2] / s[0] for name, s in found.items()},
        {name: (s[1] / s[0], s[2] / s[0]) for name, s in layers.items() if s[0] > 0},
    )


def gate(errors: LayerErrors, ours: Mapping[str, float], rtn: Mapping[str, float], lowest_bits: int) -> list[str]:
    """Why an export must not be used; empty: it may. V3: no class worse than rtn. V5: perplexity
    within the gate, and not worse than rtn's.
    """
    reasons = [
        f"output error of {name} ({errors.ours[name]:.3e}) must not exceed rtn's ({errors.rtn[name]:.3e}); give "
        "more calibration rows, or use method rtn"
        for name in errors.worse()
    ]
    if "perplexity" in ours:
        before, limit = ours["perplexity_before"], PERPLEXITY_GATE[lowest_bits]
        growth = ours["perplexity"] / before - 1
        if growth > limit:
            reasons.append(
                say(
                    f"perplexity ({ours['perplexity']:.4f}) must grow by at most {limit:.1%} from {before:.4f}"
                    f", but grew by {growth:.1%}; use quantization mix or wint8, method clip or gptq with "
                    "--calib, or a larger target_tp",
                    f"困惑度（{ours['perplexity']:.4f}）相对 {before:.4f} 的增幅不能超过 {limit:.1%}"
                    f"，但增加了 {growth:.1%}；请用 quantization mix 或 wint8、method clip 或带 --calib 的 "
                    "gptq，或更大的 target_tp",
                )
            )
        if ours["perplexity"] > max(rtn.get("perplexity", np.inf), before * _NOISE):
            reasons.append(
                f"perplexity ({ours['perplexity']:.4f}) must not exceed rtn's ({rtn['perplexity']:.4f}); give "
                "more calibration rows, or use method rtn"
            )
    return reasons


def score_notes(scores: Sequence[Mapping[str, float]]) -> list[str]:
    """What to know of scores before, by rtn, and by the chosen codes: those by which rtn answers
    better. On a few hundred rows one answer decides that, so it refuses nothing, as the logits'
    error does.
    """
    _, plain, after = scores
    return [
        f"{name} is {after[name]:.4f}, rtn's is {plain[name]:.4f}: rounding to nearest answered these rows "
        "better, perhaps by chance. Score more rows "
        "(--eval, --eval_max_samples), or take --method rtn."
        for name in after
        if after[name] < plain[name]
    ]


def table(
    errors: LayerErrors, ours: Mapping[str, float], rtn: Mapping[str, float], scores: Sequence[Mapping[str, float]]
) -> str:
    """What the checks measured, for people: one line a class of layers and a number, rtn beside
    it.
    """
    lines = [f"{'relative output error':<28}{'ours':>12}{'rtn':>12}"]
    lines += [f"  {name:<26}{errors.ours[name]:>12.3e}{errors.rtn[name]:>12.3e}" for name in errors.ours]
    words = {
        "kl": "logits: KL (nats)",
        "top1": "logits: same first choice",
        "max_difference": "logits: largest difference",
        "router_agreement": "routers: same experts",
        "perplexity": "perplexity",
    }
    lines += [f"{words[key]:<28}{ours[key]:>12.5f}{rtn[key]:>12.5f}" for key in words if key in ours]
    if "perplexity_before" in ours:
        lines.append(f"{'perplexity before':<28}{ours['perplexity_before']:>12.5f}")
    if scores:
        before, plain, after = scores
        lines += [
            f"{name + ' (before ' + format(before[name], '.4f') + ')':<28}{after[name]:>12.4f}{plain[name]:>12.4f}"
            for name in before
        ]
    return "\n".join(lines)

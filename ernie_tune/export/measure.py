"""What a model does on some inputs, and how far two models are apart there: logits, perplexity,
choices of the routers.

Refuses to know: which models are compared and why, files of weights.
Legend: T tokens of an input, N positions looked at, V vocabulary, k choices of a router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_tune.config.language import say
from ernie_tune.data.batching import Dropped, Encoder, MicroBatch, collate
from ernie_tune.data.processor import Processor
from ernie_tune.data.sources import load_dataset
from ernie_tune.export.source import Weights
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput, pack
from ernie_tune.models.moe import RouterTap
from ernie_tune.models.specs import parameter_specs

Array = np.ndarray[Any, Any]
_LOOKED_AT = 4096  # positions whose logits are kept
_BATCH_ROWS = 16
_MAX_TOKENS = 4096  # longer rows are left out


@dataclass(frozen=True)
class Probe:
    """One input and where to look: predictions at `rows_N`, of ids `target_N` where the input has
    targets.
    """

    inputs: PackedInput
    rows_N: Array
    target_N: Array | None = None


def probes_of(batches: Sequence[MicroBatch]) -> list[Probe]:
    return [Probe(batch.inputs, batch.source_N, batch.target_N) for batch in batches]


def read_batches(path: str, processor: Processor, limit: int, parts: int = 1) -> list[MicroBatch]:
    """At most `limit` rows of a data file, spread over it, in small batches, at least `parts` of
    them where there are rows. ValueError for no row.
    """
    records, dropped = load_dataset(path), Dropped()
    encoder = Encoder(processor, _MAX_TOKENS)
    count = min(limit, len(records))
    found = [encoder(records[i * len(records) // count], dropped) for i in range(count)]
    samples = [s for s in found if s is not None]
    if not samples:
        raise ValueError(
            say(
                f"{path} must hold a row that can be used: {'; '.join(dropped.lines()) or 'it is empty'}; "
                "give another file",
                f"{path} 中须有可用的行：{'; '.join(dropped.lines()) or 'it is empty'}；请换一个文件",
            )
        )
    rows = max(1, min(_BATCH_ROWS, len(samples) // parts))
    return [collate(samples[i : i + rows], processor.tokens) for i in range(0, len(samples), rows)]


def made_up_probes(processor: Processor, vision: bool) -> list[Probe]:
    """Inputs for a comparison of logits where no data are given: some sentences and two small
    pictures of waves. Nothing can be scored on them.
    """
    texts = (
        "What is 7 times 8?",
        "用一句话介绍北京。",
        "The quick brown fox jumps over the lazy dog.",
        "def f(x):\n    return x * x",
    )
    dialogues: list[Any] = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "One, two, three. 好的。"}]
        for text in texts
    ]
    encoded = [processor.encode(messages) for messages in dialogues]
    if vision:
        y, x = np.mgrid[0:56, 0:84]
        for frequency in (9.0, 3.0):
            waves = np.stack([127 + 120 * np.sin(x / frequency + c + y / 17) for c in range(3)], -1).astype(np.uint8)
            question: Any = [
                {"role": "user", "content": "<image>What is in the picture?"},
                {"role": "assistant", "content": "Waves."},
            ]
            encoded.append(processor.encode(question, [waves]))
    inputs = pack([e.row for e in encoded], processor.tokens)
    return [Probe(inputs, np.arange(len(inputs.input_ids_T)))]


def save_inputs(file: Path, probe: Probe) -> None:
    """For a process of its own."""
    i = probe.inputs
    arrays: dict[str, Any] = {
        "ids": i.input_ids_T,
        "positions": i.position_ids_T3,
        "vision": i.vision_T,
        "placeholder": i.placeholder_T,
    }
    arrays |= {"offsets": np.asarray(i.offsets), "rows": probe.rows_N[:_LOOKED_AT]}
    if i.pixel_values_PC is not None:
        arrays |= {"pixels": i.pixel_values_PC, "grid": np.asarray(i.grid_thw_n3)}
    np.savez(file, **arrays)


def load_inputs(file: Path) -> tuple[PackedInput, Array]:
    """What `save_inputs` wrote: the input and the positions to look at."""
    with np.load(file) as z:
        pixels = (z["pixels"], z["grid"]) if "pixels" in z else (None, None)
        offsets = tuple(z["offsets"].tolist())
        return PackedInput(z["ids"], z["positions"], z["vision"], z["placeholder"], offsets, *pixels), z["rows"]


def model_of(weights: Weights) -> ErnieModel:
    """A float32 model with these weights: bfloat16 values widened, quantised ones expanded by
    whoever `weights` is.
    """
    model = ErnieModel(weights.config)
    set_weights(model, weights)
    model.eval()
    return model


def set_weights(model: ErnieModel, weights: Weights) -> None:
    """Overwrite every parameter of a float32 model; one matrix at a time is in memory besides."""
    state = model.state_dict()
    for name, spec in parameter_specs(weights.config).items():
        if len(spec.shape) == 3:
            state[name].set_value(np.stack([weights.read(name, e, "F32") for e in range(spec.shape[0])]))
        else:
            state[name].set_value(np.ascontiguousarray(weights.read(name, None, "F32")))


@dataclass(frozen=True)
class Look:
    """What one model did: log-probabilities [N, V] of each probe, the summed nll of all targets and
    their number, and every router's choices.
    """

    logp: list[Array]
    nll: float
    targets: int
    chosen: list[Array]  # sorted experts [T, k] of one router and one probe

    @property
    def perplexity(self) -> float | None:
        return float(np.exp(self.nll / self.targets)) if self.targets else None


def look(model: ErnieModel, probes: Sequence[Probe]) -> Look:
    """Run a model over the probes."""
    logps, chosen, nll, count = [], [], 0.0, 0
    for probe in probes:
        tap = RouterTap(keep=True)
        with paddle.no_grad():
            hidden = paddle.gather(model(probe.inputs, tap=tap), paddle.to_tensor(probe.rows_N))
            logits = model.logits(hidden).astype("float32").numpy()
        logp_NV = log_softmax(logits)
        if probe.target_N is not None:
            nll -= float(logp_NV[np.arange(len(logp_NV)), probe.target_N].sum())
            count += len(probe.target_N)
        logps.append(logp_NV[:_LOOKED_AT])
        chosen += [np.sort(record.chosen_Tk.numpy(), -1) for record in tap.records]
    return Look(logps, nll, count, chosen)


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out


def distance(reference: Look, other: Look) -> dict[str, float]:
    """KL(reference || other) in nats (mean over positions), share of equal first choices, largest
    |difference of a log-probability|, share of expert choices that are the same, and both
    perplexities where there are targets. Routers: which experts a token gets, whatever their order.
    """
    kl = top = positions = 0.0
    largest = 0.0
    for a, b in zip(reference.logp, other.logp, strict=True):
        kl += float((np.exp(a) * (a - b)).sum())
        top += int((a.argmax(-1) == b.argmax(-1)).sum())
        positions += len(a)
        largest = max(largest, float(np.abs(a - b).max(initial=0)))
    out = {"kl": kl / positions, "top1": top / positions, "max_difference": largest}
    pairs = zip(reference.chosen, other.chosen, strict=True)
    same = [(sum(len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)), a.size) for a, b in pairs]
    if same:
        out["router_agreement"] = sum(s for s, _ in same) / max(1, sum(n for _, n in same))
    if reference.perplexity is not None and other.perplexity is not None:
        out["perplexity"] = other.perplexity
        out["perplexity_before"] = reference.perplexity
    return out

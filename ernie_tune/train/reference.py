"""The reference policy: where its log-probabilities come from, and a cache that knows what they were computed with (methods.md 3.4).

Modes: `model` a frozen copy; `adapter_off` the policy without its adapter; `adapter_ref` a frozen copy of the adapter that training started from;
`precomputed` the policy before training, computed once and stored; `none`. The rule: where training continues an adapter, `adapter_off` would be the raw
base and not the policy that training started from, so the default is `adapter_ref` there.
Refuses to know: losses, the loop, settings' names beyond the mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_tune.data.processor import Processor
from ernie_tune.data.units import UnitBatch
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.preference import mixed_reference
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.train.objective import target_logp

ADAPTER = "reference"  # name of the frozen copy
CACHE_FILE = "reference_logps.npz"
# The policy and its reference are one at the start; sums in another order differ by less than this.
SAME = 1e-3


def choose_mode(mode: str, model: ErnieModel, moving: bool = False) -> str:
    """What "auto" stands for: `model` without adapters, `adapter_off` for a fresh one, `adapter_ref` for one that already changes the model, or where
    the reference is to move. Raises ValueError for adapter modes without an adapter."""
    peft = isinstance(model, PeftModel) and model.active is not None
    if mode.startswith("adapter") and not peft:
        raise ValueError(f"ref_mode ({mode}) must go with a model that has an adapter; set model or precomputed")
    if mode == "model" and peft:
        raise ValueError(
            "ref_mode (model) must go with a model that is trained itself; with an adapter set adapter_off or adapter_ref, which need no second model"
        )
    if mode != "auto":
        return mode
    if not peft:
        return "model"
    assert isinstance(model, PeftModel)
    return "adapter_ref" if moving or not is_fresh(model) else "adapter_off"


def is_fresh(model: PeftModel) -> bool:
    """Whether the active adapter leaves the model as it was. A learned prompt or prefix never does; its reference is the model without it all the same."""
    adapter = model.adapters[model.active or ""]
    if adapter.copies:
        return False  # may have been trained: only a comparison of weights would tell, and a copy is always right
    if not isinstance(adapter.config, LoraConfig):
        return True
    factors = [
        value
        for layer in adapter.places.values()
        for name, value in layer.named_parameters()
        if name.endswith("lora_B")
    ]
    return all(not float(value.abs().max()) for value in factors)


def frozen_copy(model: ErnieModel) -> ErnieModel:
    """A second model with the same weights, none of which is trained."""
    copy = ErnieModel(model.config, model.compute_dtype)
    state = model.state_dict()
    for name, value in copy.state_dict().items():
        value.set_value(state[name])
    for parameter in copy.parameters():
        parameter.stop_gradient = True
    copy.eval()
    return copy


class LogpCache:
    """Log-probabilities of answers' tokens by the answers' keys, and the identity of what they were computed with."""

    def __init__(self, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        self.values: dict[str, np.ndarray] = {}

    def lookup(self, keys: Sequence[str]) -> np.ndarray | None:
        """The values of all keys side by side, None if one is missing."""
        found = [self.values.get(key) for key in keys]
        present = [value for value in found if value is not None]
        return np.concatenate(present) if len(present) == len(found) else None

    def add(self, keys: Sequence[str], lengths: Sequence[int], logp_N: np.ndarray) -> None:
        """Keep what is new; a key that is known keeps its value."""
        for key, part in zip(keys, np.split(logp_N, np.cumsum(lengths)[:-1]), strict=True):
            self.values.setdefault(key, part.astype(np.float32))

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.array([len(v) for v in self.values.values()], np.int64)
        values = np.concatenate([*self.values.values(), np.zeros(0, np.float32)])
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("wb") as stream:
            np.savez(
                stream,
                keys=np.array(list(self.values), "S32"),
                lengths=lengths,
                values=values,
                identity=np.array(json.dumps(self.identity)),
            )
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Add a file's values. Raises ValueError naming what it was computed with instead of ours."""
        with np.load(path) as stored:
            identity = json.loads(str(stored["identity"]))
            differ = [
                name for name in sorted({*identity, *self.identity}) if identity.get(name) != self.identity.get(name)
            ]
            if differ:
                raise ValueError(
                    f"{path}: reference was computed with another {' and '.join(differ)} ({identity.get(differ[0])}) and must be of this run's "
                    f"({self.identity.get(differ[0])}); delete the file to compute it again, or restore what it was computed with"
                )
            parts = np.split(stored["values"], np.cumsum(stored["lengths"])[:-1]) if len(stored["lengths"]) else []
            self.values.update({key.decode(): part for key, part in zip(stored["keys"].tolist(), parts, strict=True)})


def weights_hash(model: ErnieModel) -> str:
    """Names one policy: every parameter and buffer, adapters included."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        array = value.astype("float32") if value.dtype == paddle.bfloat16 else value
        digest.update(np.ascontiguousarray(array.numpy()).tobytes())
    return digest.hexdigest()


def identity_of(model: ErnieModel, processor: Processor) -> dict[str, str]:
    """What reference log-probabilities depend on besides the row itself."""
    media = json.dumps(
        [dataclasses.asdict(processor.images), dataclasses.asdict(processor.videos)], sort_keys=True, default=str
    )
    template = f"{processor.template.variant}\n{processor.template.to_jinja()}"

    def short(text: str) -> str:
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    return {"model": weights_hash(model), "template": short(template), "image preprocessing": short(media)}


class Reference:
    """Log-probabilities under the policy that training started from, or under what has become of it (TR-DPO)."""

    def __init__(self, policy: ErnieModel, mode: str, identity: Mapping[str, str] | None = None) -> None:
        """Takes its copy now, so make it before the policy changes. `mode`: one that `choose_mode` gives."""
        self.policy, self.mode = policy, mode
        self.cache = LogpCache(identity or {})
        self.model: ErnieModel | None = frozen_copy(policy) if mode == "model" else None
        if mode == "adapter_ref":
            assert isinstance(policy, PeftModel)
            if ADAPTER not in policy.adapters:
                policy.copy_adapter(policy.active or "", ADAPTER)
        self.sealed = False  # a precomputed reference cannot answer for rows that were not there

    @contextlib.contextmanager
    def _acting(self) -> Iterator[ErnieModel]:
        if self.model is not None:
            yield self.model
        elif self.mode in ("adapter_off", "adapter_ref"):
            assert isinstance(self.policy, PeftModel)
            with self.policy.acting(ADAPTER if self.mode == "adapter_ref" else None):
                yield self.policy
        else:
            yield self.policy

    def attached(self, batch: UnitBatch) -> UnitBatch:
        """The batch with `ref_logp_N`; the same batch in mode `none`. Raises ValueError for a row that a precomputed reference does not have."""
        if self.mode == "none":
            return batch
        keys = [key for unit in batch.units for key in unit.keys]
        known = self.cache.lookup(keys)
        if known is None:
            if self.sealed:
                at = next(u.where for u in batch.units if self.cache.lookup(u.keys) is None)
                raise ValueError(
                    f"{at}: row must be in the precomputed reference; data must not change in a run, start again in another output_dir"
                )
            self.cache.add(keys, batch.length_C.tolist(), self.compute(batch))
            known = self.cache.lookup(keys)
        return dataclasses.replace(batch, ref_logp_N=known)

    def compute(self, batch: UnitBatch) -> np.ndarray:
        """Log-probabilities [N] by the reference, without gradients and dropout."""
        with self._acting() as model:
            return frozen_logp(model, batch)

    def update(self, share: float) -> None:
        """TR-DPO: move the reference towards the policy (share 1: copy it)."""
        self.cache.values.clear()
        if self.mode == "adapter_ref":
            assert isinstance(self.policy, PeftModel)
            self.policy.mix_adapter(self.policy.active or "", ADAPTER, share)
            return
        assert self.model is not None, self.mode
        state = self.policy.state_dict()
        with paddle.no_grad():
            for name, value in self.model.state_dict().items():
                value.set_value(
                    mixed_reference(value, state[name], share) if value.is_floating_point() else state[name]
                )

    def save_weights(self, folder: Path) -> None:
        """What a reference that moves needs to go on from a checkpoint."""
        if self.model is not None:
            arrays = {name: value.astype("float32").numpy() for name, value in self.model.state_dict().items()}
        else:
            assert isinstance(self.policy, PeftModel)
            arrays = {
                str(i): p.astype("float32").numpy() for i, p in enumerate(self.policy.adapters[ADAPTER].parameters())
            }
        with (folder / "reference_weights.npz").open("wb") as stream:
            np.savez(stream, **arrays)

    def load_weights(self, folder: Path) -> None:
        with np.load(folder / "reference_weights.npz") as stored:
            targets: Mapping[str, Any]
            if self.model is not None:
                targets = self.model.state_dict()
            else:
                assert isinstance(self.policy, PeftModel)
                targets = {str(i): p for i, p in enumerate(self.policy.adapters[ADAPTER].parameters())}
            for name, value in targets.items():
                value.set_value(paddle.to_tensor(stored[name]).astype(value.dtype))


def frozen_logp(model: ErnieModel, batch: UnitBatch) -> np.ndarray:
    """Log-probabilities [N] of a batch's targets by `model` as it is, without gradients and dropout."""
    training = model.training
    model.eval()
    with paddle.no_grad():
        logp_N = target_logp(model, model(batch.inputs), batch).numpy()
    if training:
        model.train()
    return np.asarray(logp_N)


def start_difference(policy: ErnieModel, batch: UnitBatch) -> float:
    """The largest |log pi(y) - log pi_ref(y)| of a batch with `ref_logp_N`: 0 but for rounding where the reference is the policy at the start."""
    assert batch.ref_logp_N is not None
    difference_N = frozen_logp(policy, batch) - batch.ref_logp_N
    return float(np.abs(np.bincount(batch.candidate_N, weights=difference_N)).max())

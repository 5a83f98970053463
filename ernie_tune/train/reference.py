"""The reference policy: where its log-probabilities come from, and a cache that knows what they
were computed with.

Modes: `model` a frozen copy; `adapter_off` the policy without its adapter; `adapter_ref` a frozen
copy of the adapter that training started from; `precomputed` the policy before training, computed
once and stored; `none`. The rule: where training continues an adapter, `adapter_off` would be the
raw base and not the policy that training started from, so the default is `adapter_ref` there.
Refuses to know: losses, the loop, settings' names beyond the mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.sharded import WHOLE, Region, Shards
from ernie_tune.checkpoint.state import ALONE, Ranks
from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.data.units import UnitBatch
from ernie_tune.machine.stages import StagedForward, frozen_outputs
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.objective import Outputs, logp_outputs
from ernie_tune.objectives.preference import mixed_reference
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.slots import NAME as SLOT

# what is called: a model, or one whose stages are on several ranks
Asked = ErnieModel | StagedForward
Lay = Callable[[ErnieModel], Asked]

ADAPTER = "reference"  # name of the frozen copy
CACHE_FILE = "reference_logps.npz"
# The policy and its reference are one at the start; sums in another order differ by less than this.
SAME = 1e-3


def choose_mode(mode: str, model: ErnieModel, moving: bool = False) -> str:
    """What "auto" stands for: `model` without adapters, `adapter_off` for a fresh one,
    `adapter_ref` for one that already changes the model, or where the reference is to move. Raises
    ValueError for adapter modes without an adapter.
    """
    peft = isinstance(model, PeftModel) and model.active is not None
    if mode.startswith("adapter") and not peft:
        raise ValueError(
            say(
                f"ref_mode ({mode}) must go with a model that has an adapter; set model or precomputed",
                f"ref_mode（{mode}）要求模型带有适配器；请设 model 或 precomputed",
            )
        )
    if mode == "model" and peft:
        raise ValueError(
            say(
                "ref_mode (model) must go with a model that is trained itself; with an adapter set "
                "adapter_off or adapter_ref, which need no second model",
                "ref_mode（model）须用于训练模型本身的情形；使用适配器时请设 adapter_off 或 "
                "adapter_ref，无需第二个模型",
            )
        )
    if mode != "auto":
        return mode
    if not peft:
        return "model"
    assert isinstance(model, PeftModel)
    return "adapter_ref" if moving or not is_fresh(model) else "adapter_off"


def is_fresh(model: PeftModel) -> bool:
    """Whether the active adapter leaves the model as it was. A learned prompt or prefix never does;
    its reference is the model without it all the same.
    """
    adapter = model.adapters[model.active or ""]
    if adapter.copies:
        # may have been trained: only a comparison of weights would tell, and a copy is always right
        return False
    if not isinstance(adapter.config, LoraConfig):
        return True
    factors = [
        value
        for layer in adapter.places.values()
        for name, value in layer.named_parameters()
        if name.endswith("lora_B")
    ]
    return all(not float(value.abs().max()) for value in factors)


def frozen_copy(model: ErnieModel, lay: Lay) -> tuple[ErnieModel, Asked]:
    """A second model with the same weights, none of which is trained, and what is called for it. It
    has no values until it lies as `model` does: then it takes the same parts.
    """
    with paddle.LazyGuard():
        copy = ErnieModel(model.config, model.compute_dtype)
    for parameter in copy.parameters():
        parameter.stop_gradient = True
    asked, state = lay(copy), model.state_dict()
    for name, value in copy.state_dict().items():
        value.set_value(state[name])
    copy.eval()
    return copy, asked


def make_room(policy: PeftModel) -> bool:
    """Room for the frozen copy that mode `adapter_ref` compares with; whether there was none. On a
    mesh it comes before the policy is laid over it, whose values may be read only then: `take_copy`
    after it.
    """
    if ADAPTER in policy.adapters:
        return False
    policy.add_like(policy.active or "", ADAPTER)
    return True


def take_copy(policy: PeftModel) -> None:
    """The active adapter as it is now becomes what is compared with."""
    policy.mix_adapter(policy.active or "", ADAPTER, 1.0)


class LogpCache:
    """Log-probabilities of answers' tokens by the answers' keys, and the identity of what they were
    computed with.
    """

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
        """Add a file's values. Raises ValueError naming what it was computed with instead of
        ours.
        """
        with np.load(path) as stored:
            identity = json.loads(str(stored["identity"]))
            differ = [
                name for name in sorted({*identity, *self.identity}) if identity.get(name) != self.identity.get(name)
            ]
            if differ:
                raise ValueError(
                    say(
                        f"{path}: reference was computed with another {' and '.join(differ)} ("
                        f"{identity.get(differ[0])}) and must be of this run's ({self.identity.get(differ[0])}); "
                        "delete the file to compute it again, or restore what it was computed with",
                        f"{path}：参考结果由另一个 {' and '.join(differ)}（{identity.get(differ[0])}"
                        f"）算得，须与本次运行（{self.identity.get(differ[0])}"
                        "）一致；请删除该文件重新计算，或恢复当时的设置",
                    )
                )
            parts = np.split(stored["values"], np.cumsum(stored["lengths"])[:-1]) if len(stored["lengths"]) else []
            self.values.update({key.decode(): part for key, part in zip(stored["keys"].tolist(), parts, strict=True)})


def weights_hash(model: ErnieModel, cut: Shards = WHOLE, ranks: Ranks = ALONE) -> str:
    """Names one policy: every parameter and buffer, adapters included. The same under every layout:
    sums, modulo 2^64, of what each value and its place in the whole tensor are mixed to. A
    collective; `cut` says where this rank's parts lie.
    """
    mine: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for name, value in model.state_dict().items():
        region = cut.of(name, value)
        array = value.astype("float32") if value.dtype == paddle.bfloat16 else value
        mine[name, region.offset] = _mixed(array.numpy(), region)
    sums: dict[str, list[int]] = {}
    for (name, _), parts in {at: found for said in ranks.gather(mine) for at, found in said.items()}.items():
        seen = sums.setdefault(name, [0, 0])
        seen[:] = ((a + b) % 2**64 for a, b in zip(seen, parts, strict=True))
    return hashlib.blake2b(json.dumps(sorted(sums.items())).encode(), digest_size=16).hexdigest()


def _mixed(values: np.ndarray, region: Region) -> tuple[int, int]:
    """Two sums of splitmix64 (Steele et al. 2014) of (bits of a value, its place), under two
    seeds.
    """
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(region.shape)
    strides = np.cumprod([1, *region.whole[:0:-1]], dtype=np.uint64)[::-1]
    place = np.zeros(region.shape, np.uint64)
    for axis, (first, stride) in enumerate(zip(region.offset, strides, strict=False)):
        index = np.arange(first, first + region.shape[axis], dtype=np.uint64) * stride
        place += index.reshape([-1 if i == axis else 1 for i in range(len(region.shape))])
    out = []
    for seed in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F):
        z = (place + np.uint64(1)) * np.uint64(seed) ^ bits.astype(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out.append(int((z ^ (z >> np.uint64(31))).sum(dtype=np.uint64)))
    return out[0], out[1]


def identity_of(model: ErnieModel, processor: Processor, cut: Shards = WHOLE, ranks: Ranks = ALONE) -> dict[str, str]:
    """What reference log-probabilities depend on besides the row itself."""
    media = json.dumps(
        [dataclasses.asdict(processor.images), dataclasses.asdict(processor.videos)], sort_keys=True, default=str
    )
    template = f"{processor.template.variant}\n{processor.template.to_jinja()}"

    def short(text: str) -> str:
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    return {
        "model": weights_hash(model, cut, ranks),
        "template": short(template),
        "image preprocessing": short(media),
    }


class Reference:
    """Log-probabilities under the policy that training started from, or under what has become of it
    (TR-DPO).

    On a mesh every rank makes one, and the calls of `lacks`, `attached` and `compute` with it
    together. `asked`: what is called for the policy, where that is not the model itself; `lay`:
    puts a model beside it on the mesh and returns what is called for that; `outputs`: what
    log-probabilities are (of answers that were sampled: over what could be sampled).
    """

    def __init__(
        self,
        policy: ErnieModel,
        mode: str,
        identity: Mapping[str, str] | None = None,
        asked: Asked | None = None,
        lay: Lay = lambda model: model,
        outputs: Callable[..., Outputs] = logp_outputs,
    ) -> None:
        """Takes its copy now, so make it before the policy changes. `mode`: one that `choose_mode`
        gives.
        """
        self.policy, self.mode, self.outputs = policy, mode, outputs
        self.asked: Asked = policy if asked is None else asked
        self.cache = LogpCache(identity or {})
        self.model: ErnieModel | None = None
        if mode == "model":
            self.model, self.asked = frozen_copy(policy, lay)
        if mode == "adapter_ref":
            assert isinstance(policy, PeftModel)
            if make_room(policy):
                take_copy(policy)
        self.sealed = False  # a precomputed reference cannot answer for rows that were not there

    @contextlib.contextmanager
    def _acting(self) -> Iterator[Asked]:
        if self.mode in ("adapter_off", "adapter_ref"):
            assert isinstance(self.policy, PeftModel)
            with self.policy.acting(ADAPTER if self.mode == "adapter_ref" else None):
                yield self.asked
        else:
            yield self.asked

    def lacks(self, batch: UnitBatch) -> bool:
        """Whether the batch must go through the reference."""
        return self.mode != "none" and self.cache.lookup([key for unit in batch.units for key in unit.keys]) is None

    def attached(self, batch: UnitBatch, anew: bool | None = None) -> UnitBatch:
        """The batch with column ref_logp_N; the same batch in mode `none`. `anew`: whether it goes
        through the reference, where ranks that compute together have agreed on it; what is known
        stays as it is. Raises ValueError for a row that a precomputed reference does not have.
        """
        if self.mode == "none":
            return batch
        keys = [key for unit in batch.units for key in unit.keys]
        if self.lacks(batch) if anew is None else anew:
            if self.sealed:
                at = next((u.where for u in batch.units if self.cache.lookup(u.keys) is None), "a row of another rank")
                raise ValueError(
                    say(
                        f"{at}: row must be in the precomputed reference; data must not change in a run, start "
                        "again in another output_dir",
                        f"{at}：该行须在预先计算的参考中；运行中数据不能改变，请换一个 output_dir 重新开始",
                    )
                )
            self.cache.add(keys, batch.length_C.tolist(), self.compute(batch))
        return self._with(batch, keys)

    def _with(self, batch: UnitBatch, keys: Sequence[str]) -> UnitBatch:
        known = self.cache.lookup(keys)
        assert known is not None
        return batch.with_columns(ref_logp_N=known)

    def compute(self, batch: UnitBatch) -> np.ndarray:
        """Log-probabilities [N] by the reference, without gradients and dropout."""
        with self._acting() as model:
            return frozen_outputs(model, self.outputs, batch)["logp_N"]

    def update(self, share: float) -> None:
        """TR-DPO: move the reference towards the policy (share 1: copy it). On a mesh each rank
        moves its part.
        """
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

    def moving(self) -> dict[str, Tensor]:
        """What of a reference that moves must be kept to go on from a checkpoint: this rank's
        parts, by the whole model's names.
        """
        if self.model is not None:
            return dict(self.model.named_parameters())
        assert isinstance(self.policy, PeftModel)
        adapter = self.policy.adapters[ADAPTER]
        own = {
            f"{module}.{SLOT}.{ADAPTER}.{leaf}": value
            for module, layer in adapter.places.items()
            for leaf, value in layer.named_parameters()
        }
        return {**own, **adapter.copies}


def frozen_logp(model: Asked, batch: UnitBatch) -> np.ndarray:
    """Log-probabilities [N] of a batch's targets by `model` as it is, without gradients and
    dropout.
    """
    return frozen_outputs(model, logp_outputs, batch)["logp_N"]


def start_difference(policy: Asked, batch: UnitBatch) -> float:
    """The largest |log pi(y) - log pi_ref(y)| of a batch with column ref_logp_N: 0 but for rounding
    where the reference is the policy at the start.
    """
    difference_N = frozen_logp(policy, batch) - batch.columns["ref_logp_N"]
    return float(np.abs(np.bincount(batch.candidate_N, weights=difference_N)).max())

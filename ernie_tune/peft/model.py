"""`PeftModel`: an ErnieModel with adapters on it. It shares every layer with the model it is made
from and behaves like it in every call.

    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32,
    target_modules=["query_key_value"], lora_dropout=0.05, task_type="CAUSAL_LM"))

Canonical parameter names stay; adapters add `<module>.adapters.<adapter>.<tensor>`. Refuses to
know: data, losses, optimizers, distribution.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_tune.checkpoint.in_memory import is_model, take_model
from ernie_tune.config.language import say
from ernie_tune.models.cache import Cache
from ernie_tune.models.ernie import Elsewhere, ErnieModel, Recompute
from ernie_tune.models.inputs import PackedInput
from ernie_tune.models.layers import LowRank, has_values
from ernie_tune.models.moe import RouterTap
from ernie_tune.peft import build, slots
from ernie_tune.peft.build import Places
from ernie_tune.peft.config import LoraConfig, PeftConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.files import Stored, read_adapter, write_adapter
from ernie_tune.peft.freeze import opened
from ernie_tune.peft.lora import ExpertLora, LinearLora
from ernie_tune.peft.other_lora import is_lora_config, take_lora_config
from ernie_tune.peft.quantize import SWAPPED, is_quantised
from ernie_tune.peft.report import trainable_table
from ernie_tune.peft.targets import modules_named
from ernie_tune.peft.virtual_tokens import LengthenedInput, PromptEmbedding, with_virtual_tokens


@dataclass
class Adapter:
    """One adapter on the model: its layers by module name, and its copies of parameters trained in
    full by their name.
    """

    config: PeftConfig
    places: Places
    copies: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    waiting: bool = False  # made before the model had values, for `PeftModel.settle`

    def parameters(self) -> list[Tensor]:
        return [*(value for layer in self.places.values() for value in layer.parameters()), *self.copies.values()]


class PeftModel(ErnieModel):
    """See the module's docstring. All parameters of the model are frozen; those of the active
    adapter are trained.
    """

    def __init__(self, base: ErnieModel, config: PeftConfig | None = None, adapter_name: str = "default") -> None:
        nn.Layer.__init__(self)  # not ErnieModel's: the layers exist
        for name, layer in base.named_children():
            self.add_sublayer(name, layer)
        self.config, self.compute_dtype, self.name_or_path = base.config, base.compute_dtype, base.name_or_path
        self.training = base.training
        self.__dict__["base"] = base  # not a sublayer: all its layers are ours already
        self.adapters: dict[str, Adapter] = {}
        self.originals: dict[str, Tensor] = {}  # what `copies` replace
        self.active: str | None = None
        self.dialect = "auto"  # the form in which adapters are saved
        for value in base.parameters():
            value.stop_gradient = True
        if config is not None:
            self.add_adapter(config, adapter_name)

    # --- adapters by name -------------------------------------------------------------------------

    def add_adapter(self, config: PeftConfig, name: str = "default") -> None:
        """Attach a fresh adapter and make it the active one. ValueError for a name in use and for
        targets that do not exist.
        """
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(
                say(
                    f"adapter name ({name!r}) must be made of letters, digits, _ and -; choose another",
                    f"适配器名（{name!r}）须由字母、数字、_ 和 - 组成；请换一个",
                )
            )
        if name in self.adapters:
            raise ValueError(
                say(
                    f"adapter name ({name!r}) must be new, there is {sorted(self.adapters)}; delete_adapter it first",
                    f"适配器名（{name!r}）不能重复，已有 {sorted(self.adapters)}；请先 delete_adapter",
                )
            )
        adapter = Adapter(config, build.places(self, config), waiting=not all(map(has_values, self.base.parameters())))
        if isinstance(config, LoraConfig):
            adapter.copies = self._copies(config)
        layers = dict(self.named_sublayers())
        for module, layer in adapter.places.items():
            slots.attach(layers[module], name, layer)
        adapter.hooks = build.connect(self, config)
        self.adapters[name] = adapter
        self.set_adapter(name)

    def _copies(self, config: LoraConfig) -> dict[str, Tensor]:
        """Trainable copies of the parameters of `modules_to_save`."""
        with self.disable_adapter():
            own = {
                name: layer
                for name, layer in self.named_sublayers()
                if (layer._parameters or isinstance(layer, SWAPPED)) and f".{slots.NAME}" not in name
            }
            copies = {}
            for module in modules_named(config.modules_to_save, list(own)):
                if isinstance(own[module], SWAPPED):
                    raise ValueError(
                        say(
                            f"modules_to_save ({module}) must have float weights, but is quantised; use LoRA for it",
                            f"modules_to_save（{module}）须为浮点权重，但它已量化；请改用 LoRA",
                        )
                    )
                for leaf, value in own[module]._parameters.items():
                    if value is not None and leaf != "e_score_correction_bias":
                        copies[f"{module}.{leaf}"] = build.copy_of(own[module], value)
                        self.originals.setdefault(f"{module}.{leaf}", value)
        return copies

    def settle(self) -> None:
        """Let adapters that were attached before the model had its values take what they start
        from. The model may lie over ranks: all call it.
        """
        layers = dict(self.named_sublayers())
        for adapter in self.adapters.values():
            if not adapter.waiting:
                continue
            for module, layer in adapter.places.items():
                if isinstance(layer, LinearLora):
                    layer.settle(layers[module])
            for parameter, value in adapter.copies.items():
                value.set_value(self.originals[parameter].detach())
            adapter.waiting = False

    def set_adapter(self, name: str) -> None:
        """Make one adapter act, and train it alone. ValueError for an unknown name."""
        self._get(name)
        for other, adapter in self.adapters.items():
            for value in adapter.parameters():
                value.stop_gradient = other != name
        self._activate(name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. If it was the active one, none is afterwards."""
        adapter = self._get(name)
        if self.active == name:
            self._activate(None)
        layers = dict(self.named_sublayers())
        for module in adapter.places:
            slots.detach(layers[module], name)
        for hook in adapter.hooks:
            hook.remove()
        del self.adapters[name]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model as it was before any adapter, bit for bit, for the length of a `with`: the
        reference policy.
        """
        with self.acting(None):
            yield

    @contextlib.contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """Let another adapter act (None: none) for the length of a `with`, without a change of what
        is trained.
        """
        if name is not None:
            self._get(name)
        before = self.active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def add_like(self, source: str, name: str) -> None:
        """A frozen adapter under a new name with places for the values of `source`, and none of
        them; the active one stays active.
        """
        before, config = self.active, self._get(source).config
        self.add_adapter(config, name)
        if before is not None:
            self.set_adapter(before)

    def mix_adapter(self, source: str, name: str, share: float) -> None:
        """Move the tensors of adapter `name` towards those of `source`: share * source + (1 -
        share) * name.
        """
        with paddle.no_grad():
            for mine, other in zip(self._get(name).parameters(), self._get(source).parameters(), strict=True):
                mine.set_value(other * share + mine * (1 - share) if share < 1 else other.clone())

    def _get(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise ValueError(
                say(
                    f"adapter name ({name!r}) must be one of {sorted(self.adapters)}; load_adapter adds others",
                    f"适配器名（{name!r}）须为 {sorted(self.adapters)} 之一；用 load_adapter 可添加",
                )
            )
        return self.adapters[name]

    def _activate(self, name: str | None) -> None:
        self.active = name
        layers = dict(self.named_sublayers())
        for adapter in self.adapters.values():
            for module in adapter.places:
                layers[module].adapters.active = name
        copies = self.adapters[name].copies if name else {}
        for parameter, original in self.originals.items():
            module, _, leaf = parameter.rpartition(".")
            layers[module]._parameters[leaf] = copies.get(parameter, original)

    # --- the model --------------------------------------------------------------------------------

    def forward(
        self,
        inputs: PackedInput,
        *,
        tap: RouterTap | None = None,
        cache: Cache | None = None,
        recompute: Recompute | None = None,
        read: np.ndarray | None = None,
    ) -> Tensor:
        """Final hidden states [T, D] of the caller's tokens; rows of virtual tokens are added
        before and dropped after.
        """
        longer, real_T = self.prepared(inputs, decoding=cache is not None and not cache.prefilling)
        again = opened(recompute) if recompute else None
        read = read if read is None or real_T is None else real_T[read]
        hidden = super().forward(longer, tap=tap, cache=cache, recompute=again, read=read)
        return hidden if real_T is None else paddle.gather(hidden, paddle.to_tensor(real_T))

    def prepared(self, inputs: PackedInput, decoding: bool = False) -> tuple[PackedInput, np.ndarray | None]:
        """As `ErnieModel.prepared`: with the virtual tokens of an active prompt or prefix, which a
        cache holds already when decoding.
        """
        config = self.adapters[self.active].config if self.active else None
        if not isinstance(config, PromptConfig | PrefixConfig):
            return inputs, None
        count = config.num_virtual_tokens
        shift = count if isinstance(config, PromptConfig) else 0
        if decoding:
            return dataclasses.replace(inputs, position_ids_T3=inputs.position_ids_T3 + shift), None
        return with_virtual_tokens(inputs, count, shift)

    def low_rank(self) -> Mapping[int, LowRank] | None:
        """As `ErnieModel.low_rank`: for LoRA of linear layers alone."""
        found: dict[int, LowRank] = {}
        layers = dict(self.named_sublayers())
        for adapter in self.adapters.values():
            plain = isinstance(adapter.config, LoraConfig) and not adapter.copies
            if not plain or not all(isinstance(own, LinearLora) and own.only_adds for own in adapter.places.values()):
                return None
            found |= {id(layers[name]): layers[name].adapters for name in adapter.places}
        return found

    def embed(self, inputs: PackedInput, features_FD: Tensor | None) -> Tensor:
        """As `ErnieModel.embed`; an active prompt is told which rows are its own."""
        layers = self.adapters[self.active].places.values() if self.active else ()
        lengthened = isinstance(inputs, LengthenedInput)
        prompts = [layer for layer in layers if lengthened and isinstance(layer, PromptEmbedding)]
        for prompt in prompts:
            prompt.claim(inputs.offsets)
        try:
            return super().embed(inputs, features_FD)
        finally:
            for prompt in prompts:
                prompt.claim(None)

    def keep(self, names: Collection[str]) -> None:
        """As `ErnieModel.keep`; adapters go with their layers."""
        super().keep(names)
        self.base.keep(names)
        layers = {name for name, layer in self.named_sublayers() if not isinstance(layer, Elsewhere)}

        def kept(parameter: str) -> bool:
            return parameter.rpartition(".")[0] in layers

        for name, adapter in self.adapters.items():
            if "embed_tokens" in adapter.places and "embed_tokens" in layers - set(
                names
            ):  # here as the head's matrix only
                slots.detach(self.embed_tokens, name)
                del adapter.places["embed_tokens"]
            adapter.places = {module: layer for module, layer in adapter.places.items() if module in layers}
            adapter.copies = {key: value for key, value in adapter.copies.items() if kept(key)}
        self.originals = {key: value for key, value in self.originals.items() if kept(key)}

    def learning_rate_scale(self, name: str) -> float:
        """Learning rate of one parameter over the run's: LoRA+ gives B a higher one than A. For the
        optimizer's groups.
        """
        _, found, own = name.partition(f".{slots.NAME}.")
        config = self.adapters[own.split(".")[0]].config if found else None
        return config.lora_plus_scale if isinstance(config, LoraConfig) and own.endswith(".lora_B") else 1.0

    def print_trainable_parameters(self) -> None:
        """Print the active adapter's scale and what is trained, by part of the model
        (`report.py`).
        """
        config = self.adapters[self.active].config if self.active else None
        if isinstance(config, LoraConfig):
            print(
                say(
                    f"LoRA {self.active!r}: r {config.r}, alpha {config.alpha:g}, scaling {config.scaling:g}",
                    f"LoRA {self.active!r}：r {config.r}，alpha {config.alpha:g}，缩放 {config.scaling:g}",
                )
            )
        print(trainable_table(self), flush=True)

    # --- files ------------------------------------------------------------------------------------

    def adapter_entries(self) -> list[tuple[str, Tensor, int | None]]:
        """(name in the file, parameter, its row there or None) of the active adapter and its
        copies: where `exported` comes from.
        """
        adapter = self._get(self.active or "")
        return [*build.entries(adapter.places), *((key, value, None) for key, value in adapter.copies.items())]

    def exported(self) -> dict[str, np.ndarray]:
        """The active adapter's layers as float32 arrays under the names of `dialects.py`."""
        adapter = self._get(self.active or "")
        return build.export(adapter.config, adapter.places)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dialect: str | None = None,
        adapter_name: str | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
    ) -> list[Path]:
        """Write one adapter (the active one by default) in the form "paddlenlp" or "peft" (by
        default `self.dialect`; `files.py`); returns the paths. `tensors`: its values where not all
        of them are here.
        """
        name = adapter_name or self.active
        if name is None:
            raise ValueError(
                say(
                    f"adapter_name (None) must be given where no adapter is active; there is {sorted(self.adapters)}",
                    f"没有启用的适配器时须给出 adapter_name（现为 None）；现有 {sorted(self.adapters)}",
                )
            )
        adapter = self._get(name)
        config = build.exported_config(adapter.config, self.name_or_path)
        values = (
            {**build.export(adapter.config, adapter.places), **_arrays(adapter.copies)} if tensors is None else tensors
        )
        stored = Stored(config, {key: np.asarray(value, np.float32) for key, value in values.items()})
        code = "BF16" if self.compute_dtype == "bfloat16" else "F32"
        return write_adapter(Path(folder), stored, self.config, dialect or self.dialect, code)

    def load_adapter(self, folder: str | os.PathLike[str], name: str = "default") -> None:
        """Add the adapter in a folder, of either dialect, under `name`, and make it the active one.
        Errors: `read_adapter`, `add_adapter`.
        """
        stored = read_adapter(Path(folder), self.config)
        self.take(stored, folder, name)
        kind = type(stored.config).__name__.removesuffix("Config")
        scale = f", scaling {stored.config.scaling:g}" if isinstance(stored.config, LoraConfig) else ""
        print(
            say(
                f"ernie_tune: {folder}: {kind} adapter {name!r}, {len(stored.tensors)} tensors{scale}",
                f"ernie_tune：{folder}：{kind} 适配器 {name!r}，{len(stored.tensors)} 个张量{scale}",
            ),
            file=sys.stderr,
            flush=True,
        )

    def take(self, stored: Stored, source: str | os.PathLike[str], name: str = "default") -> None:
        """Add an adapter with its values, and make it the active one; `source` is what errors call
        it. Errors: `add_adapter`, and ValueError for tensors that it has no place for.
        """
        before = self.active
        self.add_adapter(stored.config, name)
        try:
            self._fill(self.adapters[name], stored, source)
        except ValueError:
            self.delete_adapter(name)
            self._activate(before)
            raise

    def _fill(self, adapter: Adapter, stored: Stored, folder: str | os.PathLike[str]) -> None:
        rest = build.fill(stored.config, adapter.places, stored.tensors)
        for key, value in rest.items():
            if key not in adapter.copies:
                raise ValueError(
                    say(
                        f"{folder}: tensor {key!r} must belong to a layer of the adapter; fetch the adapter again",
                        f"{folder}：张量 {key!r} 须属于适配器的某层；请重新获取适配器",
                    )
                )
            build.assign(adapter.copies[key], value, key)
        adapter.waiting = False

    @classmethod
    def from_pretrained(
        cls, model: ErnieModel, folder: str | os.PathLike[str], adapter_name: str = "default"
    ) -> PeftModel:
        """`model` with the adapter in `folder`."""
        made = cls(model)
        made.load_adapter(folder, adapter_name)
        return made

    def merge(self, inputs: PackedInput | None = None) -> tuple[ErnieModel, float | None]:
        """Add the active LoRA adapter into the weights, drop all adapters, and return the plain
        model (still frozen) with its canonical names.

        With `inputs`, also the largest |change of a logit| on them, which is printed. Raises
        ValueError for adapters that are no LoRA and for a quantised base: merge into the float
        weights, then quantise again.
        """
        adapter = self._get(self.active or "")
        if not isinstance(adapter.config, LoraConfig):
            raise ValueError(
                say(
                    f"merge must be given a LoRA adapter, not {type(adapter.config).__name__}; keep it as an adapter",
                    f"只有 LoRA 适配器可以合并，而不是 {type(adapter.config).__name__}；请保留为适配器",
                )
            )
        if is_quantised(self):
            raise ValueError(
                say(
                    "merge must be given float weights, but the base is quantised; load the float model and "
                    "the adapter, merge, quantise again",
                    "合并需要浮点权重，但底座已量化；请加载浮点模型和适配器，合并后再量化",
                )
            )
        before = self._eval_logits(inputs)
        copies, layers = dict(adapter.copies), dict(self.named_sublayers())
        with paddle.no_grad():
            for module, layer in adapter.places.items():
                _merge(layers, module, layer)
        for name in list(self.adapters):
            self.delete_adapter(name)
        for parameter, value in copies.items():
            self.originals[parameter].set_value(value)
        self.base.training = self.training  # its layers follow ours, it does not
        after = self._eval_logits(inputs)
        if before is None or after is None:
            return self.base, None
        change = float(np.abs(after - before).max())
        print(
            say(
                f"ernie_tune: merged: largest |change of a logit| {change:.2e} on {len(before)} tokens",
                f"ernie_tune：已合并：{len(before)} 个 token 上 logit 的最大变化为 {change:.2e}",
            ),
            file=sys.stderr,
            flush=True,
        )
        return self.base, change

    def _eval_logits(self, inputs: PackedInput | None) -> np.ndarray | None:
        if inputs is None:
            return None
        training = self.training
        self.eval()
        with paddle.no_grad():
            logits = self.logits(self(inputs)).astype("float32").numpy()
        if training:
            self.train()
        return logits


def _merge(layers: dict[str, nn.Layer], module: str, adapter: nn.Layer) -> None:
    if isinstance(adapter, LinearLora):
        weight = layers[module].weight
        weight.set_value(adapter.merged(weight))
    elif isinstance(adapter, ExpertLora):
        owner, _, leaf = module.rpartition(".")
        stack = layers[owner]._parameters[leaf.replace("_product", "_proj")]
        for j, expert in enumerate(adapter.experts):
            stack[expert] = stack[expert] + adapter.delta(j)


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.astype("float32").numpy() for name, value in tensors.items()}


def get_peft_model(model: Any, config: Any, adapter_name: str = "default") -> PeftModel:
    """`model` with a fresh adapter; its own parameters are frozen. A model and a `LoRAConfig` of
    PaddleNLP or PaddleFormers are taken as they are. ValueError for a model that has adapters
    already (use `add_adapter`), and as `take_model` and `take_lora_config`.
    """
    model = take_model(model) if is_model(model) else model
    config = take_lora_config(config) if is_lora_config(config) else config
    if isinstance(model, PeftModel):
        raise ValueError(
            say(
                "model must not be a PeftModel already; call model.add_adapter(config, name)",
                "model 不能已是 PeftModel；请调用 model.add_adapter(config, name)",
            )
        )
    return PeftModel(model, config, adapter_name)

"""Objects of PaddleNLP and PaddleFormers, by stand-ins with their true names, defaults and configs
(`golden/their_objects.json`, which `golden/check_objects.py` recorded from the libraries): taken
as they are, given back equal to the last bit.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_runs import processor

import ernie_tune
from ernie_tune import adopt, get_peft_model, give_back
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.names import layout
from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.data.processor import Processor
from ernie_tune.models.config_dialects import read_config
from ernie_tune.peft.config import LoraConfig
from ernie_tune.trainers.sft import SFTTrainer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "their_objects.json").read_text(encoding="utf-8"))
LIBRARIES = ("paddlenlp", "paddleformers")
ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(8)]


class Strategy(enum.Enum):
    NO = "no"
    STEPS = "steps"


def their(library: str, kind: str, **changes: Any) -> Any:
    """One of their dataclasses: all its fields with the defaults and values that were recorded."""
    table = GOLDEN[library][kind]
    fields = [
        (name, Any, dataclasses.field(default_factory=lambda d=default: d))  # type: ignore[misc]
        if isinstance(default, list | dict)
        else (name, Any, dataclasses.field(default=default))
        for name, (default, _) in table.items()
    ]
    made = dataclasses.make_dataclass(kind, fields)(**{name: value for name, (_, value) in table.items()} | changes)
    if kind == "TrainingArguments":
        made.evaluation_strategy, made.save_strategy = Strategy(made.evaluation_strategy), Strategy(made.save_strategy)
    return made


class Model(paddle.nn.Layer):  # type: ignore[misc]
    """What theirs is to us: a config that can be told, and parameters by name."""

    def __init__(self, told: dict[str, Any], values: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: told, **told)
        self.values = {name: paddle.to_tensor(value) for name, value in values.items()}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return self.values


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def seeing() -> Model:
    """Ernie4_5_VLMoeForConditionalGeneration of preset tiny-a."""
    told = GOLDEN["paddleformers"]["Ernie4_5_VLConfig"]
    return Model(told, drawn({n: s.shape for n, s in layout(read_config(told_of(told)), "paddleformers").disk.items()}))


def told_of(told: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in told.items() if v not in (None, "None") and k != "quantization_config"}


def dense() -> Model:
    """Ernie4_5ForCausalLM: fused by group of heads, with a head of its own name."""
    told = GOLDEN["paddleformers"]["Ernie4_5Config"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (640, 96), "model.norm.weight": (96,)}
    for i in range(2):
        own = {"self_attn.qkv_proj": (96, 160), "self_attn.o_proj": (96, 96), "mlp.up_gate_proj": (96, 320)}
        own |= {"mlp.down_proj": (160, 96), "input_layernorm": (96,), "post_attention_layernorm": (96,)}  # type: ignore[dict-item]
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    values = drawn(shapes)
    return Model(told, {**values, "lm_head.weight": values["model.embed_tokens.weight"]})


def equal(model: Model, before: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(model.values[name].numpy(), value) for name, value in before.items())


@pytest.mark.parametrize("make", [seeing, dense])
def test_models_come_back_to_the_last_bit(make: Any) -> None:
    theirs = make()
    before = {name: value.numpy().copy() for name, value in theirs.values.items()}
    ours = adopt(theirs)
    assert isinstance(ours, AutoModel)
    for value in theirs.values.values():
        value.set_value(value * 0)
    assert give_back(ours, theirs) is theirs
    assert equal(theirs, before), "every parameter was taken and written"
    assert adopt(ours) is ours


def test_queries_keys_and_values_are_parted_as_their_forward_does() -> None:
    """mix.reshape([…, kv heads, (share + 2) * width]).split([share * width, width, width])."""
    theirs = dense()
    ours = adopt(theirs)
    x = np.random.default_rng(1).normal(size=(3, 96)).astype(np.float32)
    mixed = (x @ theirs.values["model.layers.1.self_attn.qkv_proj.weight"].numpy()).reshape(3, 2, 5 * 16)
    want = {
        "q": mixed[:, :, :48].reshape(3, 96),
        "k": mixed[:, :, 48:64].reshape(3, 32),
        "v": mixed[:, :, 64:].reshape(3, 32),
    }
    for name, value in want.items():
        found = x @ getattr(ours.layers[1].self_attn, f"{name}_proj").weight.numpy()
        np.testing.assert_allclose(found, value, atol=1e-6)


def test_what_was_trained_is_given_back() -> None:
    theirs = dense()
    ours = adopt(theirs)
    ours.embed_tokens.weight.set_value(ours.embed_tokens.weight + 1)
    before = theirs.values["model.embed_tokens.weight"].numpy().copy()
    give_back(ours, theirs)
    np.testing.assert_array_equal(theirs.values["model.embed_tokens.weight"].numpy(), before + 1)
    np.testing.assert_array_equal(theirs.values["lm_head.weight"].numpy(), before + 1)


def test_models_that_cannot_be_taken() -> None:
    theirs = dense()
    theirs.config.to_dict()["tensor_model_parallel_size"] = 2
    try:
        with pytest.raises(ValueError, match=r"tensor_model_parallel_size \(2\) must be 1"):
            adopt(theirs)
    finally:
        theirs.config.to_dict()["tensor_model_parallel_size"] = 1
    del theirs.values["model.norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing: ernie\.norm\.weight"):
        adopt(theirs)
    theirs = dense()
    theirs.values["lm_head.weight"] = theirs.values["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="must equal the embedding"):
        adopt(theirs)
    theirs = dense()
    theirs.values["model.norm.weight"] = theirs.values["model.norm.weight"].astype("int32")
    with pytest.raises(ValueError, match=r"norm.weight \(paddle.int32\) must be a floating type"):
        adopt(theirs)
    with pytest.raises(ValueError, match=r"must be that of an ERNIE-4\.5 model"):
        adopt(Model({"model_type": "llama"}, {}))
    with pytest.raises(ValueError, match=r"object \(list\) must be a model"):
        adopt([])
    with pytest.raises(ValueError, match=r"object \(list\) must be a model"):
        give_back(None, [])
    with pytest.raises(ValueError, match="must have the shape of ours"):
        give_back(adopt(dense()), seeing())


def test_an_adapter_is_merged_before_its_model_is_given_back() -> None:
    theirs = dense()
    tuned = get_peft_model(theirs, LoraConfig(r=2, target_modules=["o_proj"], freeze_config=""))
    with pytest.raises(ValueError, match=r"give back model.merge\(\)\[0\]"):
        give_back(tuned, theirs)
    for name, value in tuned.named_parameters():
        if name.endswith("lora_B"):
            value.set_value(paddle.full_like(value, 0.1))
    before = theirs.values["model.layers.0.self_attn.o_proj.weight"].numpy().copy()
    give_back(tuned.merge()[0], theirs)
    assert np.abs(theirs.values["model.layers.0.self_attn.o_proj.weight"].numpy() - before).max() > 1e-4


def lora_model() -> SimpleNamespace:
    """LoRAModel: a Layer with `model` and `lora_config`, factors beside the weights."""

    class Wrapped(paddle.nn.Layer):  # type: ignore[misc]
        pass

    out, inner = Wrapped(), seeing()
    rng = np.random.default_rng(2)
    for i in range(3):
        for name, width in (("q_proj", 96), ("v_proj", 32)):
            owner = f"model.layers.{i}.self_attn.{name}"
            inner.values[f"{owner}.lora_A"] = paddle.to_tensor(rng.normal(size=(96, 4)).astype(np.float32))
            inner.values[f"{owner}.lora_B"] = paddle.to_tensor(rng.normal(size=(4, width)).astype(np.float32))
    out.model = inner
    out.lora_config = their(
        "paddleformers", "LoRAConfig", r=4, lora_alpha=8, target_modules=[".*q_proj.*", ".*v_proj.*"]
    )
    return out


def test_lora_models_come_back_to_the_last_bit() -> None:
    theirs = lora_model()
    before = {name: value.numpy().copy() for name, value in theirs.model.values.items()}
    ours = adopt(theirs)
    assert ours.adapters["default"].config.scaling == 2
    for name, value in theirs.model.values.items():
        if "lora_" in name:
            value.set_value(value * 0)
    give_back(ours, theirs)
    assert equal(theirs.model, before)
    del theirs.model.values["model.layers.0.self_attn.q_proj.lora_A"]
    with pytest.raises(ValueError, match="is in one alone"):
        give_back(ours, theirs)
    with pytest.raises(ValueError, match="must be a PeftModel"):
        give_back(adopt(seeing()), theirs)
    for name in [name for name in theirs.model.values if "lora_" in name]:
        del theirs.model.values[name]
    with pytest.raises(ValueError, match="must hold lora_A and lora_B"):
        adopt(theirs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_lora_settings(library: str) -> None:
    theirs = their(
        library, "LoRAConfig", r=4, lora_alpha=8, rslora=True, target_modules=[".*q_proj.*"], lora_dropout=0.1
    )
    ours = adopt(theirs)
    assert (ours.r, ours.lora_alpha, ours.rslora, ours.target_modules) == (4, 8, True, (".*q_proj.*",))
    assert give_back(ours, theirs) == theirs
    assert give_back(dataclasses.replace(ours, r=16), theirs).r == 16
    assert theirs.r == 4
    with pytest.raises(ValueError, match=r"use_dora \(True\) must be a field"):
        give_back(dataclasses.replace(ours, use_dora=True), theirs)
    for name, value in (("trainable_bias", "all"), ("loraga", True), ("enable_lora_list", [True])):
        with pytest.raises(ValueError, match=rf"{name} \({value!r}\)".replace("[", r"\[").replace("]", r"\]")):
            adopt(their(library, "LoRAConfig", **{name: value}))
    assert adopt(their(library, "LoRAConfig", trainable_modules=".*lm_head.*")).modules_to_save == ("lm_head",)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("library", LIBRARIES)
def test_training_arguments(library: str) -> None:
    theirs = their(library, "TrainingArguments", learning_rate=3e-4, max_steps=7, lr_scheduler_type="cosine", seed=7)
    ours = adopt(theirs)
    want = {"learning_rate": 3e-4, "max_steps": 7, "lr_scheduler_type": "cosine", "seed": 7, "logging_steps": 500}
    want |= {"per_device_train_batch_size": 8, "stage": "SFT", "fine_tuning": "Full", "output_dir": "out"}
    assert {name: getattr(ours, name) for name in want} == want
    assert give_back(ours, theirs) == theirs
    changed = give_back(adopt(theirs, learning_rate=1e-5, eval_strategy="no", eval_steps=5), theirs)
    assert (changed.learning_rate, changed.evaluation_strategy, changed.eval_steps) == (1e-5, Strategy.NO, 5)
    assert (theirs.learning_rate, theirs.eval_steps) == (3e-4, None)
    before = adopt(
        their(library, "TrainingArguments", evaluation_strategy="steps", eval_steps=2), eval_dataset_path="x"
    )
    assert before.eval_strategy == "steps"
    with pytest.raises(ValueError, match=r"lora_rank \(32\) must be a field"):
        give_back(adopt(theirs, fine_tuning="LoRA", lora_rank=32), theirs, fine_tuning="LoRA")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_theirs_ask_for_and_ours_cannot_is_refused() -> None:
    with pytest.raises(ValueError, match="optim"):
        adopt(their("paddleformers", "TrainingArguments", optim="adafactor"))


class Told:
    """A tokenizer of theirs: it can write itself, and that is all we ask."""

    def __init__(self, own: Processor) -> None:
        self.own = own

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.own.tokenizer.token_id(token)

    def save_pretrained(self, folder: str) -> None:
        self.own.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_from_their_objects(tmp_path: Path) -> None:
    """Settings, tokenizer, LoRA, data set of paddle.io: in one run, and back."""

    class Data(paddle.io.Dataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict[str, str]:
            return ROWS[index]

        def __len__(self) -> int:
            return len(ROWS)

    theirs = lora_model()
    before = {name: value.numpy().copy() for name, value in theirs.model.values.items()}
    settings = their(
        "paddlenlp", "TrainingArguments", output_dir=str(tmp_path / "run"), max_steps=2, save_strategy="no"
    )
    settings.per_device_train_batch_size, settings.learning_rate = 2, 1e-2
    trainer = SFTTrainer(theirs, settings, train_dataset=Data(), processor=Told(processor()))
    trainer.train()
    give_back(trainer.model, theirs)
    after = {name: value.numpy() for name, value in theirs.model.values.items()}
    moved = [name for name in after if not np.array_equal(after[name], before[name])]
    assert moved
    assert all("lora_" in name for name in moved), "the base is as it was"
    assert (tmp_path / "run" / "lora_config.json").is_file()


def test_tokenizers() -> None:
    own = processor()
    ours = adopt(Told(own))
    assert ours.tokenizer.encode("why 九 7 days") == own.tokenizer.encode("why 九 7 days")
    assert give_back(ours, told := Told(own)).own is told.own

    class Foreign(Told):
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer_config.json").write_text("{}")

    with pytest.raises(ValueError, match=r"their Foreign must be that of an ERNIE-4\.5 model") as found:
        adopt(Foreign(own))
    assert "/tmp" not in str(found.value)


def test_they_are_public() -> None:
    assert ernie_tune.adopt is adopt
    assert isinstance(adopt(TrainingArguments(output_dir="x")), TrainingArguments)

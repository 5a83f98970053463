"""Are objects of PaddleFormers and PaddleNLP taken as they are, and given back as theirs? Run in an
environment of theirs, with this library on the path:

    pip install paddlepaddle==3.3.1 paddleformers==1.2.0 "pyarrow<26"
    PYTHONPATH=. python tests/golden/check_objects.py paddleformers
    # in another environment:
    # pip install paddlepaddle==3.3.1 paddlenlp==3.0.0b4 "aistudio-sdk==0.2.6" "datasets<4.5"
    # "pyarrow<23"
    PYTHONPATH=. python tests/golden/check_objects.py paddlenlp

Every line that it prints is an assertion that held. With a file as second argument it writes there
what the stand-ins of our own tests are made of: their fields, defaults and values
(`their_objects.json` has both libraries').
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import paddle

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(8)]


def same(state: dict[str, Any], before: dict[str, np.ndarray]) -> bool:
    return state.keys() == before.keys() and all(np.array_equal(state[k].numpy(), v) for k, v in before.items())


def values(model: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def settings(arguments: Any, **more: Any) -> None:
    """`TrainingArguments`: values under our names, a round trip, and changes on their side."""
    from ernie_tune import adopt, give_back

    with tempfile.TemporaryDirectory() as folder:
        theirs = arguments(
            output_dir=folder, learning_rate=3e-4, per_device_train_batch_size=2, gradient_accumulation_steps=4,
            max_steps=7, warmup_ratio=0.1, lr_scheduler_type="cosine", report_to=[], **more,
        )  # fmt: skip
        ours = adopt(theirs)
        want = {"learning_rate": 3e-4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        want |= {"max_steps": 7, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "logging_steps": 500}
        found = {name: getattr(ours, name) for name in want}
        assert found == want, found
        assert give_back(ours, theirs) == theirs
        changed = give_back(adopt(theirs, learning_rate=1e-5, eval_strategy="no"), theirs)
        assert changed.learning_rate == 1e-5
        assert changed.evaluation_strategy == theirs.evaluation_strategy
        assert theirs.learning_rate == 3e-4
    print(f"{arguments.__module__}.TrainingArguments: {len(want)} values, round trip equal, one change given back")


def lora(config: Any) -> None:
    """`LoRAConfig`, likewise."""
    import dataclasses

    from ernie_tune import adopt, give_back

    theirs = config(
        r=4, lora_alpha=8, lora_dropout=0.1, rslora=True, lora_plus_scale=2.0,
        target_modules=[".*q_proj.*", ".*v_proj.*"],
    )  # fmt: skip
    ours = adopt(theirs)
    assert (ours.r, ours.lora_alpha, ours.lora_dropout, ours.rslora, ours.lora_plus_scale) == (4, 8, 0.1, True, 2.0)
    assert ours.target_modules == (".*q_proj.*", ".*v_proj.*")
    assert ours.scaling == theirs.scaling
    assert give_back(ours, theirs) == theirs
    assert give_back(dataclasses.replace(ours, r=16), theirs).r == 16
    print(f"{config.__module__}.LoRAConfig: values, scaling, round trip equal")


def models() -> None:
    """PaddleFormers' two ERNIE-4.5 models that can be built on a CPU: values, logits, back."""
    from paddleformers.peft import LoRAConfig, LoRAModel
    from paddleformers.transformers import (
        Ernie4_5_VLConfig,
        Ernie4_5_VLMoeForConditionalGeneration,
        Ernie4_5Config,
        Ernie4_5ForCausalLM,
    )

    from ernie_tune import AutoModel, adopt, give_back
    from ernie_tune.models.inputs import Row, pack

    sizes = {"vocab_size": 640, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    config = Ernie4_5Config(**sizes, **heads)
    config.fuse_rms_norm, config._attn_implementation, config.tensor_model_parallel_size = False, "eager", 1
    dense = Ernie4_5ForCausalLM(config)
    dense.eval()
    before, ours = values(dense), adopt(dense)
    ids = np.array([1, 5, 60, 7, 200, 33, 9], np.int64)
    with paddle.no_grad():
        want = dense(paddle.to_tensor(ids[None])).logits[0].numpy()
        found = ours.logits(ours(pack([Row(ids)], ours.config.tokens))).numpy()
    apart = float(np.abs(want - found).max())
    assert apart < 2e-5, apart
    assert same(give_back(ours, dense).state_dict(), before)
    print(f"Ernie4_5ForCausalLM: logits within {apart:.1e}, given back equal")
    with paddle.no_grad():
        ours.embed_tokens.weight.set_value(ours.embed_tokens.weight * 2)
        for layer in ours.layers:
            layer.self_attn.k_proj.weight.set_value(layer.self_attn.k_proj.weight * 3)
        give_back(ours, dense)
        want = dense(paddle.to_tensor(ids[None])).logits[0].numpy()
        found = ours.logits(ours(pack([Row(ids)], ours.config.tokens))).numpy()
    assert np.abs(want - found).max() < 2e-4
    print("Ernie4_5ForCausalLM: changed values given back, the same logits")

    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config("tiny-a", seed=3).save_pretrained(folder, "paddle")
        seen = Ernie4_5_VLConfig.from_pretrained(folder)
    seen.fuse_rms_norm, seen._attn_implementation, seen.tensor_model_parallel_size = False, "eager", 1
    vision = Ernie4_5_VLMoeForConditionalGeneration(seen)
    before, ours = values(vision), adopt(vision)
    assert same(give_back(ours, vision).state_dict(), before)
    for value in ours.state_dict().values():
        value.set_value(value * 0 + 1)
    assert all((value.numpy() == 1).all() for value in give_back(ours, vision).state_dict().values()), (
        "every one is set"
    )
    print(f"Ernie4_5_VLMoeForConditionalGeneration: {len(before)} tensors taken, given back equal, and changed")

    vision.set_state_dict({name: paddle.to_tensor(value) for name, value in before.items()})
    tuned = LoRAModel(vision, LoRAConfig(r=4, lora_alpha=8, target_modules=[".*q_proj.*", ".*o_proj.*"]))
    for name, value in tuned.model.state_dict().items():
        if name.endswith("lora_B"):
            value.set_value(paddle.randn(value.shape) * 0.1)
    before, ours = values(tuned.model), adopt(tuned)
    assert same(give_back(ours, tuned).model.state_dict(), before)
    factors = {name: value for name, value in ours.named_parameters() if "lora_" in name}
    for value in factors.values():
        value.set_value(value + 1)
    after = values(give_back(ours, tuned).model)
    moved = [name for name in after if not np.array_equal(after[name], before[name])]
    assert sorted(moved) == sorted(name for name in after if "lora_" in name), moved
    print(f"LoRAModel: {len(factors)} factors taken, given back equal; changed, they alone differ")


def tokenizers() -> None:
    """Their tokenizer and processor of a folder of ours: the same ids."""
    from paddleformers.transformers import Ernie4_5_VLTokenizer, Ernie4_5Tokenizer

    from ernie_tune import adopt
    from ernie_tune.data.processor import Processor

    own = Processor.bundled("tiny")
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(folder)
        for kind in (Ernie4_5_VLTokenizer, Ernie4_5Tokenizer):
            theirs = kind.from_pretrained(folder)
            ours = adopt(theirs)
            text = "why 九 <image> 7 days"
            assert ours.tokenizer.encode(text) == own.tokenizer.encode(text)
            assert ours.stop_ids == own.stop_ids
            print(f"{kind.__name__}: the same ids")


def trains(arguments: Any, data: Any, **more: Any) -> None:
    """Their settings and data set in our trainer."""
    from ernie_tune import AutoModel, SFTTrainer
    from ernie_tune.data.processor import Processor

    with tempfile.TemporaryDirectory() as folder:
        theirs = arguments(
            output_dir=str(Path(folder) / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], **more
        )
        trainer = SFTTrainer(
            AutoModel.from_config("tiny-a"), theirs, train_dataset=data, processor=Processor.bundled("tiny")
        )
        metrics = trainer.train()
        assert trainer.loop.step == 2 or metrics
    print(f"{type(data).__name__} and their TrainingArguments: two steps")


def record(library: str, file: Path) -> None:
    """Fields of their dataclasses as [default, value after they were made], and configs as told."""
    import dataclasses
    import json

    from ernie_tune.config.other_arguments import plain

    def told(made: Any) -> dict[str, Any]:
        out = {}
        for field in dataclasses.fields(made):
            default = field.default if field.default is not dataclasses.MISSING else None
            out[field.name] = [plain(default), plain(getattr(made, field.name))]
        return out

    if library == "paddlenlp":
        from paddlenlp.peft import LoRAConfig
        from paddlenlp.trainer import TrainingArguments

        found = {"TrainingArguments": told(TrainingArguments(output_dir="out", report_to=[]))}
    else:
        from paddleformers.peft import LoRAConfig
        from paddleformers.trainer import TrainingArguments
        from paddleformers.transformers import Ernie4_5_VLConfig, Ernie4_5Config

        from ernie_tune import AutoModel

        more = {"amp_master_grad": False, "device": "cpu"}
        found = {"TrainingArguments": told(TrainingArguments(output_dir="out", report_to=[], **more))}
        with tempfile.TemporaryDirectory() as folder:
            AutoModel.from_config("tiny-a", seed=3).save_pretrained(folder, "paddle")
            found["Ernie4_5_VLConfig"] = Ernie4_5_VLConfig.from_pretrained(folder).to_dict()
        sizes = {"vocab_size": 640, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
        found["Ernie4_5Config"] = Ernie4_5Config(**sizes, **heads).to_dict()
    found["LoRAConfig"] = told(LoRAConfig())
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    text = json.dumps({**known, library: found}, indent=None, default=str, sort_keys=True)
    file.write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")


def main(library: str, file: str = "") -> None:
    if file:
        return record(library, Path(file))

    class Own(paddle.io.Dataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> dict[str, str]:
            return ROWS[index]

        def __len__(self) -> int:
            return len(ROWS)

    if library == "paddlenlp":
        from paddlenlp.datasets import MapDataset
        from paddlenlp.peft import LoRAConfig
        from paddlenlp.trainer import TrainingArguments

        settings(TrainingArguments)
        lora(LoRAConfig)
        for data in (MapDataset(ROWS), Own()):
            trains(TrainingArguments, data)
        return
    from paddleformers.peft import LoRAConfig
    from paddleformers.trainer import TrainingArguments

    more = {"amp_master_grad": False, "device": "cpu"}
    settings(TrainingArguments, **more)
    lora(LoRAConfig)
    models()
    tokenizers()
    trains(TrainingArguments, Own(), **more)


if __name__ == "__main__":
    main(*sys.argv[1:])

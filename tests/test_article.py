"""The founding article's code runs with only its import lines changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def prepare(folder: Path) -> None:
    """What the article takes from a hub, and the data that it leaves to the reader."""
    from ernie_tune import AutoModel
    from ernie_tune.data.processor import Processor

    model = folder / "baidu" / "ERNIE-4.5-VL-424B-A47B-Paddle"
    AutoModel.from_config("tiny-b").save_pretrained(model)
    Processor.bundled("tiny").save_pretrained(model)
    rows = [{"prompt": f"What is {i} and one?", "response": f"It is {i + 1}."} for i in range(5)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "my_sft_data.jsonl").write_text("".join(lines), encoding="utf-8")


def test_the_article(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)

    # The article imports these from paddlenlp, peft and "a paddle_trainer-like library".
    from ernie_tune import AutoModel, LoraConfig, PaddleTrainer, TrainingArguments, get_peft_model, load_dataset

    model = AutoModel.from_pretrained("baidu/ERNIE-4.5-VL-424B-A47B-Paddle")
    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["query_key_value"],
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora_config)
    model.print_trainable_parameters()
    dataset = load_dataset("my_sft_data.jsonl")
    training_args = TrainingArguments(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        num_train_epochs=3,
    )
    trainer = PaddleTrainer(model=model, train_dataset=dataset, args=training_args)
    trainer.train()
    model.save_pretrained("./my_ernie_vl_lora_adapter")

    said = capsys.readouterr().out
    # q, k and v of 4 layers, 160 wide with 5 heads and 1 of 32: r * (in + out) each
    count = 4 * 16 * (2 * (160 + 32) + 160 + 160)
    assert f"trainable params: {count:,} || all params: {4_744_656 + count:,} || trainable%: " in said
    assert "LoRA 'default': r 16, alpha 32, scaling 2" in said
    assert "Total optimization steps = 4" in said, "five rows, four a step, three passes"
    written = {p.name for p in (tmp_path / "my_ernie_vl_lora_adapter").iterdir()}
    assert written == {"lora_config.json", "peft_model-00001-of-00001.safetensors", "peft_model.safetensors.index.json"}
    output = {p.name for p in (tmp_path / "output").iterdir()}
    assert {*written, "checkpoint-4", "README.md", "trainer_state.json", "ernie_tune_args.yaml"} <= output
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    assert "SFT, LoRA rank 16 of `baidu/ERNIE-4.5-VL-424B-A47B-Paddle`" in card

    # and what it made can be used
    from ernie_tune import PeftModel
    from ernie_tune.generate.opened import open_engine
    from ernie_tune.trainers.assemble import base_of_run

    again = PeftModel.from_pretrained(
        AutoModel.from_pretrained("baidu/ERNIE-4.5-VL-424B-A47B-Paddle"), "my_ernie_vl_lora_adapter"
    )
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
    assert isinstance(open_engine(Path("output"), base_of_run).model, PeftModel)

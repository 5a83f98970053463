"""Going on from a checkpoint that PaddleNLP or PaddleFormers saved: files made by their layout (as
their unified_checkpoint/load_save_single_card.py writes them) from a run of ours, which then ends
as the run that nobody stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_runs import history, mixed_rows, train, write_rows

from ernie_tune.checkpoint.names import layout
from ernie_tune.checkpoint.sharded import ShardedReader
from ernie_tune.models.presets import preset
from ernie_tune.peft.dialects import to_paddle

POWERS = ("beta1_pow_acc_0", "beta2_pow_acc_0")
# Every step sees all rows, so that it does not matter where they stood.
WHOLE: dict[str, Any] = {"per_device_train_batch_size": 6, "save_steps": 2, "adam_beta2": 0.95}
LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "lora_target_modules": ["q_proj", "o_proj"], "lora_dropout": 0.0}


@pytest.fixture(scope="module", params=["Full", "LoRA"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(the folder of a whole run, its settings)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "train.jsonl", mixed_rows(6))
    changes = {**WHOLE, **(LORA if request.param == "LoRA" else {})}
    train(folder, output_dir=str(folder / "whole"), **changes)
    return folder, {**changes, "train_dataset_path": str(folder / "train.jsonl")}


def theirs(ours: Path, to: Path, lora: bool) -> Path:
    """The same state as they save it."""
    folder = to / "checkpoint-2"
    folder.mkdir(parents=True)
    reader = ShardedReader(ours / "optimizer")
    slots = {key.rsplit("/", 1)[1] for key in reader.shapes}
    held = {s: {k.rsplit("/", 1)[0]: reader.read(k) for k in reader.shapes if k.endswith(f"/{s}")} for s in slots}
    assert slots == {"value", "moment1_0", "moment2_0", *POWERS}
    config = preset("tiny-a")
    table = layout(config, "paddleformers")

    def named(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if lora:
            plain = {name.replace(".adapters.default", ""): value for name, value in values.items()}
            return {k: np.ascontiguousarray(v) for k, v in to_paddle(plain, config).items()}
        known = [n for n in table.disk if all(link.canonical in values for link in table.links_from[n])]
        return {n: np.array(table.to_disk(n, lambda c, e: values[c] if e is None else values[c][e])) for n in known}

    if lora:
        for name in ("lora_config.json", *(f.name for f in ours.glob("peft_model*"))):
            (folder / name).write_bytes((ours / name).read_bytes())
    else:  # as with save_to_hf, while moments have the names of the live model
        (folder / "model.safetensors").write_bytes((ours / "model.safetensors").read_bytes())
    state = {f"{n}/{s}": v for s in ("moment1_0", "moment2_0") for n, v in named(held[s]).items()}
    for slot in POWERS:
        [power] = {float(value[0]) for value in held[slot].values()}
        state |= {f"{n}/{slot}": np.array([power], np.float32) for n in named(held["moment1_0"])}
    save_file(state, folder / "optimizer-00001-of-00001.safetensors", {"format": "np"})
    write_index(folder / "optimizer.safetensors.index.json", state, "optimizer-00001-of-00001.safetensors")
    (folder / "saved_signal_0").write_text("1")
    return folder


def write_index(path: Path, tensors: dict[str, np.ndarray], file: str) -> None:
    size = sum(v.nbytes for v in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(tensors, file), "master_weights": False}
    path.write_text(json.dumps(content))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def test_their_checkpoint_goes_on_to_the_same_end(
    stopped: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: Any
) -> None:
    folder, changes = stopped
    lora = "lora_rank" in changes
    taken = theirs(folder / "whole" / "checkpoint-2", tmp_path / "theirs", lora)
    out = train(tmp_path, output_dir=str(tmp_path / "out"), resume_from_checkpoint=str(taken), **changes)
    told = capsys.readouterr().out
    assert "of PaddleNLP or PaddleFormers: its weights, moments and step are taken" in told
    losses = {r["step"]: r["loss"] for r in history(out) if "loss" in r}
    whole = {r["step"]: r["loss"] for r in history(folder / "whole") if "loss" in r}
    assert sorted(losses) == [3, 4]
    assert [losses[n] for n in (3, 4)] == pytest.approx([whole[n] for n in (3, 4)], rel=1e-5)
    expected, found = weights(folder / "whole"), weights(out)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


def test_what_of_theirs_cannot_be_gone_on_from(stopped: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, changes = stopped
    taken = theirs(folder / "whole" / "checkpoint-2", tmp_path / "theirs", "lora_rank" in changes)
    start = {**changes, "resume_from_checkpoint": str(taken), "output_dir": str(tmp_path / "out")}
    file = taken / "optimizer-00001-of-00001.safetensors"
    state = load_file(file)
    gone = next(key for key in state if "o_proj" in key and key.endswith("moment1_0"))
    del state[gone]
    save_file(state, file, {"format": "np"})
    with pytest.raises(ValueError, match=r"must hold .*o_proj"):
        train(tmp_path, **start)
    write_index(taken / "optimizer.safetensors.index.json", state, file.name)
    with pytest.raises(ValueError, match=r"must hold the moments of what this run trains, but has none of .*o_proj"):
        train(tmp_path, **start)
    index = taken / "optimizer.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ValueError, match="must be the index that a save wrote"):
        train(tmp_path, **start)
    index.unlink()
    for pickle in ("optimizer.pdopt", "optimizer_state"):
        (taken / pickle).touch()
        with pytest.raises(ValueError, match=rf"{pickle} is a pickle, which is not opened; .*unified_checkpoint"):
            train(tmp_path, **start)
        (taken / pickle).unlink()
    assert not list((tmp_path / "out").glob("*.safetensors"))

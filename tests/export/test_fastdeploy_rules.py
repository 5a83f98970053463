"""FastDeploy's side, written a second time: its decision tables, and that its names and
orientations give the same model as our own table does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import model_folder

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.config.fastdeploy import FastDeployCommand
from ernie_tune.export import fastdeploy_rules as rules
from ernie_tune.export.run import write_layout
from ernie_tune.export.scheme import SCHEMES
from ernie_tune.export.source import ExportSource, stored_places

PADDLE, TORCH = {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "argument", "want"),
    [
        (PADDLE, "", rules.Quantisation()),
        (PADDLE, "wint8", rules.Quantisation("wint8", "wint8", "wint8")),
        (PADDLE, "wint4", rules.Quantisation("wint8", "wint4", "wint4")),
        (TORCH, "wint4", rules.Quantisation("wint8", "wint4", "wint4")),
        (PADDLE, SCHEMES["mix"].argument, rules.Quantisation("wint8", "wint4", "wint8")),
        (
            PADDLE,
            '{"quantization":"mix_quant","dense_quant_type":"wint4","is_quantized":false}',
            rules.Quantisation("wint4", "", ""),
        ),
        # a JSON of several keys is taken for a description of what lies on the disk, one of one key
        # for the word
        (
            PADDLE,
            '{"quantization":"mix_quant","dense_quant_type":"wint4"}',
            rules.Quantisation("wint4", "", "", on_disk=True),
        ),
        (PADDLE, '{"quantization":"wint8"}', rules.Quantisation("wint8", "wint8", "wint8")),
        # the config wins over the command line, and says whether the weights are quantised already
        (
            {**PADDLE, "quantization_config": {"quantization": "wint8", "is_quantized": False}},
            "wint4",
            rules.Quantisation("wint8", "wint8", "wint8"),
        ),
        (
            {**PADDLE, "quantization_config": {"quantization": "wint8"}},
            "",
            rules.Quantisation("wint8", "wint8", "wint8", on_disk=True),
        ),
        (
            {**PADDLE, "quantization_config": {"quantization": "wint8", "kv_cache_quant_type": "int8"}},
            "",
            rules.Quantisation("wint8", "wint8", "wint8"),
        ),
        (
            {
                **PADDLE,
                "quantization_config": {
                    "quantization": "mix_quant",
                    "dense_quant_type": "wint8",
                    "moe_quant_type": "wint4",
                    "is_moe_quantized": True,
                },
            },
            "",
            rules.Quantisation("wint8", "wint4", "wint4", on_disk=True),
        ),
    ],
)
def test_quantisation_table(config: dict[str, Any], argument: str, want: rules.Quantisation) -> None:
    assert rules.quantisation(config, argument) == want


def test_quantisation_refusals() -> None:
    with pytest.raises(ValueError, match=r"must be absent from a config\.json with torch_dtype"):
        rules.quantisation({**TORCH, "quantization_config": {"quantization": "wint8"}}, "")
    with pytest.raises(ValueError, match="must hold the key quantization"):
        rules.quantisation({**PADDLE, "quantization_config": {"bits": 8}}, "")
    with pytest.raises(ValueError, match=r"quantization \('w4a8'\) must be"):
        rules.quantisation(PADDLE, "w4a8")


def test_weight_format() -> None:
    assert (rules.weight_format(PADDLE), rules.weight_format(TORCH)) == ("paddle", "torch")
    for config in ({}, {**PADDLE, **TORCH}):
        with pytest.raises(ValueError, match="exactly one of dtype and torch_dtype"):
            rules.weight_format(config)


def test_weight_files(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError, match=r".+") as caught:
            rules.weight_files(tmp_path)
        return str(caught.value)

    assert "must hold model.safetensors or" in message()
    shards = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert f"must hold {shards[0]}" in message()
    for shard in shards:
        (tmp_path / shard).write_bytes(b"")
    assert rules.weight_files(tmp_path) == [tmp_path / shard for shard in shards]
    index.write_text(json.dumps({"weight_map": {"a": shards[1]}}))
    assert "all N of them" in message()
    index.write_text(json.dumps({"weight_map": {"a": "part1.safetensors"}}))
    assert "must be model-00001-of-0000N.safetensors" in message()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "must not hold both" in message()
    index.unlink()
    assert rules.weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    for name in ("rank0", "rank1"):
        (tmp_path / name).mkdir()
    assert "pre-sharded" in message()
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    assert "would read it instead" in message()


@pytest.mark.parametrize("preset", ["tiny-a", "tiny-c"])
@pytest.mark.parametrize("flavour", ["paddle", "hf"])
def test_the_second_table_gives_the_same_model(tmp_path: Path, preset: str, flavour: str) -> None:
    """Image experts behind text experts, gate before up, q before k before v, routers as they are:
    by value, for both layouts.
    """
    source = ExportSource(model_folder(tmp_path / "base", preset))
    write_layout(tmp_path / "out", source, flavour)
    reader = TensorReader(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    view = rules.Folder(config, reader.shapes, reader.read)
    view.check_names()
    assert view.silent == []
    seen = set()
    for parameter in rules.parameters(config):
        for name, expert, array in rules.canonical_parts(parameter.name, view.load(parameter), config):
            code = "F32" if parameter.float32 else "BF16"
            np.testing.assert_array_equal(array, source.read(name, expert, code))
            seen.add((name, expert))
    assert seen == {(name, expert) for name, expert, _ in stored_places(source.config)}


def test_text_only_models(tmp_path: Path) -> None:
    """The siblings have one family of experts; transformers' converter turns their router, the
    vision-language one does not.
    """
    from ernie_tune.models.config import MoEConfig
    from ernie_tune.models.presets import preset

    vl = preset("tiny-a")
    moe = MoEConfig(8, (48,), 3, 2, (1, 2))
    AutoModel.from_config(vl.replace(vision=None, moe=moe)).save_pretrained(tmp_path / "base")
    source = ExportSource(tmp_path / "base")
    for flavour in ("paddle", "hf"):
        write_layout(tmp_path / flavour, source, flavour)
        reader = TensorReader(tmp_path / flavour)
        config = json.loads((tmp_path / flavour / "config.json").read_text())
        view = rules.Folder(config, reader.shapes, reader.read)
        view.check_names()
        assert view.silent == []
        for parameter in rules.parameters(config):
            for name, expert, array in rules.canonical_parts(parameter.name, view.load(parameter), config):
                np.testing.assert_array_equal(array, source.read(name, expert, "F32" if parameter.float32 else "BF16"))


def test_commands() -> None:
    """The published flags, with four different ports."""
    command = FastDeployCommand("/models/mine", tensor_parallel_size=8, quantization="wint4")
    assert command.shell() == (
        "python -m fastdeploy.entrypoints.openai.api_server --model /models/mine --port 8180 --engine-worker-queue-port 8181 --metrics-port 8182 "
        "--cache-queue-port 8183 --tensor-parallel-size 8 --quantization wint4 --load-choices default_v1 --max-model-len 32768 --max-num-seqs 32 "
        '--mm-processor-kwargs \'{"video_max_frames": 30}\' --limit-mm-per-prompt \'{"image": 10, "video": 3}\' --reasoning-parser ernie-45-vl'
    )
    text = FastDeployCommand("m", vision=False).words()
    assert "--mm-processor-kwargs" not in text
    assert "--quantization" not in text
    assert "--load-choices" in text
    with pytest.raises(
        ValueError, match=r"video_max_frames \(8\) must be at least FastDeploy's video_min_frames \(16\)"
    ):
        FastDeployCommand("m", mm_processor={"video_max_frames": 8})
    FastDeployCommand("m", mm_processor={"video_max_frames": 8, "video_min_frames": 4})
    with pytest.raises(ValueError, match=r"video_max_frames \(180\) must be at least .* \(200\)"):
        FastDeployCommand("m", mm_processor={"video_min_frames": 200})
    for wrong in ({"max_pixels": 1}, {"video_fps": 2.0}, {"video_frames_sample": 1}):
        with pytest.raises(ValueError, match="FastDeploy ignores all of these settings otherwise"):
            FastDeployCommand("m", mm_processor=wrong)
    with pytest.raises(ValueError, match=r"port \(0\) must be from 1 to 65532"):
        FastDeployCommand("m", port=0)

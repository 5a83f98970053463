"""Model folders that somebody spoilt: every one is told of by the name of the file, and none takes
long.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.checkpoint.auto import AutoConfig, AutoModel
from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.config.foreign import json_object
from ernie_tune.data.processor import Processor
from ernie_tune.peft.files import read_adapter
from ernie_tune.peft.freeze import FreezeSpec

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 50_000 + "1" + "}" * 50_000
NO_OBJECTS = ("[]", "null", "5", '"x"', DEEP, DEEP_OBJECT, "", "{", "\x00")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    AutoModel.from_config("tiny-a", seed=1).save_pretrained(folder)
    Processor.bundled("tiny").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda t: t[:5] + str(len(t)))
def test_what_is_no_object(folder: Path, text: str) -> None:
    for name in (
        "config.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=name):
            (AutoConfig if name == "config.json" else Processor).from_pretrained(folder)
        (folder / name).write_bytes(kept)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        TensorReader(folder)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter(folder, AutoConfig.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"index\.json"):
        FreezeSpec.from_json(index)
    with pytest.raises(ValueError, match=r"^a\.json .*; fetch the file again"):
        json_object(text, "a.json")


@pytest.mark.parametrize(
    "shards",
    [
        '{"a": 1}',
        "null",
        '{"a": null}',
        '["a"]',
        '{"a": ["x"]}',
        '"abc"',
        '{"a": "x\\u0000y"}',
        '{"a": "' + "x" * 5000 + '"}',
        '{"a": "../x"}',
    ],
)
def test_shards_that_are_no_names(folder: Path, shards: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {shards}}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json") as caught:
        TensorReader(folder)
    assert len(str(caught.value)) < 600


ONE = '{"a":{"dtype":"F32","shape":%s,"data_offsets":%s}}'


@pytest.mark.parametrize(
    "header",
    [DEEP, DEEP_OBJECT, ONE % ("[Infinity]", "[0,4]"), ONE % ("[NaN]", "[0,4]"), ONE % ('["x"]', "[0,4]"), ONE % ("[1e30]", "[0,4]"),
     ONE % ("[1]", "[Infinity,4]"), ONE % ("[1]", "[0,Infinity]"), ONE % ("5", "[0,4]"), ONE % ("[-1]", "[0,4]"), '{"a":null}', "[1]", '{"__metadata__":5}',
     ONE % ("[" + "9" * 5000 + "]", "[0,4]")],
    ids=range(14),
)  # fmt: skip
def test_headers(tmp_path: Path, header: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TensorReader(file)


def test_numbers_beyond_any_model_are_refused_at_once(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        (folder / "config.json").write_text(json.dumps({**config, name: 10**12}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"config\.json"):
            AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("value", [10**9, 0, -1, "two", [4]])
@pytest.mark.parametrize(
    "name", ["moe_num_experts", "moe_k", "moe_intermediate_size", "depth", "patch_size", "num_heads"]
)
def test_counts_inside_a_config_are_bounded_too(folder: Path, name: str, value: Any) -> None:
    """A thousand million experts would fill the memory with their names."""
    if (name, value) == ("moe_num_experts", 0):
        return  # a dense model
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    if name in vision:
        vision[name] = value
    else:
        config[name] = [value] * len(config[name]) if isinstance(config[name], list) else value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoConfig.from_pretrained(folder)


STRANGE = {
    "tokenizer_config.json": ({"added_tokens_decoder": 5}, {"added_tokens_decoder": {"x": {"content": "a"}}}),
    "preprocessor_config.json": ({"min_pixels": "many"}, {"image_mean": 0.5}, {"patch_size": [14]}),
}


@pytest.mark.parametrize(("name", "values"), [(name, values) for name, each in STRANGE.items() for values in each])
def test_values_of_another_kind_are_refused_by_the_name_of_the_folder(
    folder: Path, name: str, values: dict[str, Any]
) -> None:
    file = folder / name
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**kept, **values}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        Processor.from_pretrained(folder)


def test_tokenizers(folder: Path) -> None:
    added = folder / "added_tokens.json"
    kept = added.read_bytes()
    added.write_text(json.dumps({f"<{i}>": 300 + i for i in range(30_000)}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"special tokens of .* \(3\d,\d+\) must be at most 20,000"):
        Processor.from_pretrained(folder)
    added.write_bytes(kept)
    for content in (b"", b"\x0a\xff\xff\xff\xff\x0f junk", bytes(100)):
        (folder / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            Processor.from_pretrained(folder)

"""Exports from end to end: every layout from every layout, adapters merged, each defect of an
exported folder refused with a message that names it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from export_cases import model_folder
from PIL import ImageFont
from support.spoiled_export import spoil
from support.tiny_runs import mixed_rows, write_rows

import ernie_tune
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.tensors import TensorReader, narrow_bfloat16, widen_bfloat16
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.data.chat import ChatTemplate
from ernie_tune.data.templates import RELEASED
from ernie_tune.export import reopen, run, verify
from ernie_tune.export import source as source_module
from ernie_tune.export.run import LAYOUTS, write_layout
from ernie_tune.export.source import ExportSource, Rounded, stored_places
from ernie_tune.peft.config import BottleneckConfig, LoraConfig
from ernie_tune.peft.model import get_peft_model

FILES = {
    "README.md",
    "serve.sh",
    "export_report.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
}
TRANSFORMERS_FILES = ("tokenizer_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TOKENIZER = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "target_modules": ["attention", "mlp", "shared_experts", "experts"]},
    "towers": {"r": 2, "target_modules": ["vision", "resampler"], "rslora": True, "lora_alpha": 5, "freeze_config": ""},
    "dora": {"r": 2, "target_modules": ["query_key_value", "down_proj"], "use_dora": True},
    "saved": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["resampler_model.mlp", "norm", "embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", mixed_rows(40))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the start of a fresh process, which `test_a_whole_folder` takes."""

    def call(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, reopen.main(*command[-2:]), "", "")

    monkeypatch.setattr(verify.subprocess, "run", call)


def adapter_folder(base: Path, folder: Path, dialect: str = "auto", **settings: Any) -> Path:
    """An adapter that changes something."""
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(base_model_name_or_path=str(base), **settings))
    rng = np.random.default_rng(5)
    for parameter in model.adapters["default"].parameters():
        noise = 0.05 * rng.standard_normal(parameter.shape).astype(np.float32)
        parameter.set_value(parameter + paddle.to_tensor(noise))
    model.save_pretrained(folder, dialect=dialect)
    return folder


def files_only(*args: Any, **options: Any) -> dict[str, Any]:
    return run.export(*args, **{"verify": "files", **options})


@pytest.mark.parametrize("preset", ["tiny-a", "tiny-c"])
@pytest.mark.parametrize("flavour", ["hf", "hf_saved", "paddleformers", "paddle"])
def test_every_layout_from_every_layout(tmp_path: Path, preset: str, flavour: str) -> None:
    """The same values arrive, whatever they came from; Source reads them back bit for bit."""
    folder = model_folder(tmp_path / "base", preset, flavour, dtype="bfloat16")
    source = ExportSource(folder)
    for layout in LAYOUTS.values():
        write_layout(tmp_path / layout, source, layout, max_shard_bytes=400_000)
        back = ExportSource(tmp_path / layout)
        assert back.table.flavour == layout
        for name, expert, float32 in stored_places(source.config):
            code = "F32" if float32 else "BF16"
            np.testing.assert_array_equal(back.read(name, expert, code), source.read(name, expert, code))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_whole_folder(base: Path, tmp_path: Path, layout: str) -> None:
    report = ernie_tune.export(base, tmp_path / "out", layout=layout)  # type: ignore[operator]
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names >= FILES | TOKENIZER | {"model.safetensors"}
    assert not list(tmp_path.glob("out.*"))
    written = json.loads((out / "export_report.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert set(written["sha256"]) == names - {"export_report.json"}
    assert written["checks"]["files_names_shapes_values"] == "equal"
    assert written["checks"]["reopened_max_difference"] <= 1e-5
    config = json.loads((out / "config.json").read_text())
    assert ("torch_dtype" in config, "dtype" in config) == ((True, False) if layout == "pt" else (False, True))
    for name in TOKENIZER - {"tokenizer_config.json"}:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"| layout | {layout} |" in card
    assert ("| read by | FastDeploy" in card) == (layout != "hf")
    assert ('"chat_template_kwargs": {"enable_thinking": false}' in card) == (layout != "hf")
    state = AutoModel.from_pretrained(out).state_dict()
    for name, value in AutoModel.from_pretrained(base).state_dict().items():
        wanted = value.numpy()
        if not name.endswith(("gate.weight", "gate.weight_1", "e_score_correction_bias")):
            wanted = widen_bfloat16(narrow_bfloat16(wanted))
        np.testing.assert_array_equal(state[name].numpy(), wanted)


@pytest.mark.usefixtures("one_process")
def test_transformers_gets_a_placeholder_for_videos(base: Path, tmp_path: Path) -> None:
    """Where the vocabulary has none, a note says what does not work there."""
    ids = json.loads((base / "added_tokens.json").read_text())
    report = files_only(base, tmp_path / "out", layout="hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report["notes"] == []
    assert config["image_token_id"] == ids["<|IMAGE_PLACEHOLDER|>"]
    assert (
        config["video_token_id"]
        == ids["<|VIDEO_PLACEHOLDER|>"]
        == run.Processor.from_pretrained(tmp_path / "out").tokens.video
    )
    own = shutil.copytree(base, tmp_path / "own")
    for name in TOKENIZER:
        held = (own / name).read_bytes()
        (own / name).write_bytes(held.replace(b"<|VIDEO_PLACEHOLDER|>", b"<|OTHER_PLACEHOLDER|>"))
    report = files_only(own, tmp_path / "out", layout="hf")
    assert "one placeholder for images and videos" in report["notes"][0]


@pytest.mark.usefixtures("one_process")
def test_what_transformers_reads_by_keys_of_its_own(base: Path, tmp_path: Path) -> None:
    """Token names, limits, a template and a font; tests/golden/check_readers.py asks transformers
    itself.
    """
    own = shutil.copytree(base, tmp_path / "own")
    settings = json.loads((own / "preprocessor_config.json").read_text())
    (own / "preprocessor_config.json").write_text(json.dumps({**settings, "max_pixels": 12544, "max_frames": 32}))
    files_only(own, tmp_path / "out", layout="hf")
    read = {name: json.loads((tmp_path / "out" / name).read_text()) for name in TRANSFORMERS_FILES}
    names = read["tokenizer_config.json"]["extra_special_tokens"]
    assert names["image_token"] == "<|IMAGE_PLACEHOLDER|>"
    assert names["video_end_token"] == "<|VIDEO_END|>"
    assert len(names) == 6
    assert read["preprocessor_config.json"]["size"] == {"shortest_edge": 3136, "longest_edge": 12544}
    clips = read["video_preprocessor_config.json"]
    assert (clips["max_frames"], clips["fps"], clips["draw_on_frames"]) == (32, 2.0, True)
    assert clips["size"] == {"shortest_edge": 234416, "longest_edge": 937664}
    font = tmp_path / "out" / clips["font"]
    assert (
        ImageFont.truetype(str(font), 20).getmask("time").getbbox()
        == ImageFont.load_default(20).getmask("time").getbbox()
    )
    template = read["tokenizer_config.json"]["chat_template"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    # A font that the model brings is kept, in the next export too.
    (own / "video_preprocessor_config.json").write_text('{"font": "Mine.ttf", "more": 1}')
    (own / "Mine.ttf").write_bytes(font.read_bytes())
    files_only(own, tmp_path / "again", layout="hf")
    clips = json.loads((tmp_path / "again" / "video_preprocessor_config.json").read_text())
    assert (clips["font"], clips["more"]) == ("Mine.ttf", 1)
    assert (tmp_path / "again" / "Mine.ttf").is_file()


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.usefixtures("one_process")
def test_placeholders_of_old_folders_are_mended(
    base: Path, tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of runs that wrote those of transformers, and of a base's own file beside: once each, with a
    line.
    """
    old = shutil.copytree(base, tmp_path / "old")
    config = json.loads((old / "tokenizer_config.json").read_text())
    config["chat_template"] = ChatTemplate().to_jinja("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>")
    (old / "tokenizer_config.json").write_text(json.dumps(config))
    released = "{# theirs #}" + ChatTemplate().to_jinja("<|image@placeholder|>", "<|video@placeholder|>")
    (old / "chat_template.jinja").write_text(released)
    report = files_only(old, tmp_path / "out", layout=layout)
    said = [line for line in capsys.readouterr().err.split("\n") if "chat template" in line]
    right = ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>") if layout == "hf" else RELEASED
    wrong = RELEASED if layout == "hf" else ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>")
    held = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    assert held == ChatTemplate().to_jinja(*right)
    beside = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert beside == released if layout != "hf" else wrong[0] not in beside
    assert len(said) == 1
    assert f"{wrong[0]} became {right[0]}" in said[0]
    noted = [f"ernie_tune: {note}" for note in report["notes"] if "template" in note]
    assert noted == ([] if layout == "hf" else said)


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("dialect", ["paddlenlp", "peft"])
@pytest.mark.usefixtures("one_process")
def test_merging_equals_the_adapter(
    base: Path, tmp_path: Path, name: str, dialect: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Matrix by matrix what `PeftModel.merge` makes, in float32; and the export's own comparison of
    logits passes and is reported.
    """
    if (name, dialect) == ("dora", "paddlenlp"):
        pytest.skip("PaddleNLP has no DoRA")
    adapter = adapter_folder(base, tmp_path / "adapter", dialect, **ADAPTERS[name])
    source, plain = ExportSource(base, [adapter]), ExportSource(base)
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=1, target_modules=["q_proj"]))
    model.load_adapter(adapter, "theirs")
    merged = model.merge()[0].state_dict()
    base_values = AutoModel.from_pretrained(base).state_dict()
    for place, expert, _ in stored_places(source.config):
        ours, wanted = source.read(place, expert, "F32"), merged[place].numpy()
        np.testing.assert_allclose(ours, wanted if expert is None else wanted[expert], atol=1e-5, rtol=1e-5)
        before = base_values[place].numpy()
        touched = (wanted != before).any() if expert is None else (wanted[expert] != before[expert]).any()
        assert (ours != plain.read(place, expert, "F32")).any() == touched, (place, expert)
    if dialect == "peft":
        # the base is named in the adapter's settings
        report = run.export(adapter, tmp_path / "out", layout="pt")
        assert report["checks"]["merge"]["kl"] < 1e-3
        assert "merged 1 adapter(s)" in capsys.readouterr().err


def test_merging_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three adapters in order, the middle one DoRA, on blocks of three rows and products of 16
    columns: what whole matrices give.
    """
    monkeypatch.setattr(source_module, "_BLOCK_BYTES", 4 * 40 * 3)
    monkeypatch.setattr(source_module, "_UNSHARED", 1)
    rng = np.random.default_rng(0)
    raw = narrow_bfloat16(rng.standard_normal((20, 40)).astype(np.float32))
    pairs = [(rng.standard_normal((20, 2)), rng.standard_normal((2, 40))) for _ in range(3)]
    magnitude = rng.uniform(1, 2, 40)
    wanted = widen_bfloat16(raw).astype(np.float64)
    for i, (a, b) in enumerate(pairs):
        wanted = wanted + a @ b
        if i == 1:
            wanted *= magnitude / np.linalg.norm(wanted, axis=0)
    factors = [
        source_module._Factors(
            a.astype(np.float32), b.astype(np.float32), magnitude.astype(np.float32) if i == 1 else None
        )
        for i, (a, b) in enumerate(pairs)
    ]
    np.testing.assert_allclose(source_module._Merged(raw, "BF16", factors).stored("F32"), wanted, rtol=1e-5, atol=1e-5)
    stored = widen_bfloat16(raw)
    kept = stored.copy()
    source_module._Merged(stored, "F32", factors).stored("BF16")
    np.testing.assert_array_equal(stored, kept)  # the file's own array is not written to


@pytest.mark.parametrize("layout", list(LAYOUTS.values()))
def test_a_matrix_is_made_once(base: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gate and up halves may be tensors of their own on the disk."""
    source, places, read = ExportSource(base), list[tuple[str, int | None]](), ExportSource.read

    def counted(self: ExportSource, name: str, expert: int | None, code: str) -> np.ndarray:
        places.append((name, expert))
        return read(self, name, expert, code)

    monkeypatch.setattr(ExportSource, "read", counted)
    write_layout(tmp_path / "out", source, layout)
    assert sorted(places, key=str) == sorted(((n, e) for n, e, _ in stored_places(source.config)), key=str)


@pytest.mark.usefixtures("one_process")
def test_two_adapters_one_after_the_other(base: Path, tmp_path: Path) -> None:
    first, second = (adapter_folder(base, tmp_path / n, **ADAPTERS[n]) for n in ("plain", "saved"))
    report = run.export([base, first, second], tmp_path / "out")
    assert report["adapters"] == [str(first), str(second)]
    assert report["checks"]["merge"]["kl"] < 1e-3


@pytest.mark.usefixtures("one_process")
def test_replaces_an_earlier_export_and_nothing_else(base: Path, tmp_path: Path) -> None:
    files_only(base, tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00009.safetensors").write_bytes(b"left over")
    files_only(base, tmp_path / "out", layout="pt")
    assert not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match=r"output_dir .* must be new, empty, or an earlier export"):
        files_only(base, tmp_path / "mine")
    with pytest.raises(ValueError, match="must not be one of the folders that are read"):
        files_only(base, base)
    shutil.copytree(base, tmp_path / "late.exporting")  # an export that was killed
    files_only(base, tmp_path / "late")
    assert not (tmp_path / "late.exporting").exists()
    shutil.copytree(tmp_path / "mine", tmp_path / "other.exporting")
    with pytest.raises(ValueError, match=r"other\.exporting must be free for the unfinished export"):
        files_only(base, tmp_path / "other")
    assert (tmp_path / "other.exporting" / "thesis.txt").is_file()


# --- defects of a folder --------------------------------------------------------------------------


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a folder: `change(name, array)` gives the new (name, array), or None to
    drop it.
    """
    reader = TensorReader(folder)
    kept, codes = {}, {}
    for name, entry in reader.entries.items():
        made = change(name, np.array(reader.read(name)))
        if made:
            kept[made[0]], codes[made[0]] = made[1], entry.dtype
    write_folder(folder, {name: (value.shape, codes[name]) for name, value in kept.items()}, kept.__getitem__)


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def renamed(folder: Path) -> None:
    rewrite(folder, lambda n, x: (n.replace("layers.1.self_attn.o_proj", "layers.1.self_attn.out_proj"), x))


def transposed(folder: Path) -> None:
    rewrite(
        folder, lambda n, x: (n, np.ascontiguousarray(x.T) if n.endswith("layers.2.self_attn.o_proj.weight") else x)
    )


def swapped_halves(folder: Path) -> None:
    rewrite(
        folder, lambda n, x: (n, np.roll(x, x.shape[1] // 2, 1) if n.endswith("experts.3.up_gate_proj.weight") else x)
    )


def exchanged_experts(folder: Path) -> None:
    other = {"experts.1.": "experts.2.", "experts.2.": "experts.1."}
    rewrite(folder, lambda n, x: (re.sub(r"experts\.[12]\.", lambda m: other[m[0]], n), x))


def turned_down(folder: Path) -> None:
    rewrite(folder, lambda n, x: (n, np.ascontiguousarray(x.T) if n == "vision_model.blocks.0.mlp.fc1.weight" else x))


DEFECTS: dict[str, tuple[Any, str]] = {
    "mutated key": (
        renamed,
        r"ernie\.layers\.1\.self_attn\.o_proj\.weight is missing(.|\n)*out_proj\.weight is unknown and would be skipped",
    ),
    "transposed square": (transposed, r"layers\.2\.self_attn\.o_proj\.weight holds other values .*: it is transposed"),
    "transposed oblong": (
        turned_down,
        r"fc1\.weight \[256, 64\] must be \[64, 256\], it would be reshaped, not transposed",
    ),
    "up before gate": (swapped_halves, r"expert 3 of layers\.1\.mlp\.text_experts\.up_gate_proj holds other values"),
    "exchanged experts": (
        exchanged_experts,
        r"expert 1 of layers\.1\.mlp\.text_experts\.up_gate_proj holds other values",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), r"none of tokenizer\.model, .* is there"),
    "no special tokens": (lambda f: (f / "added_tokens.json").unlink(), r"added_tokens\.json is missing"),
    "no pixels": (lambda f: (f / "preprocessor_config.json").unlink(), r"preprocessor_config\.json is missing"),
    "stray quantisation": (
        lambda f: set_config(f, quantization_config={"quantization": "wint8"}),
        "quantization_config makes FastDeploy take the weights for quantised",
    ),
    "online quantisation": (
        lambda f: set_config(f, quantization_config={"quantization": "wint8", "is_quantized": False}),
        "wins over the command line",
    ),
    "nameless quantisation": (lambda f: set_config(f, quantization_config={}), r"must hold the key quantization"),
    "both types": (
        lambda f: set_config(f, torch_dtype="bfloat16"),
        "exactly one of dtype and torch_dtype, but holds dtype and torch_dtype",
    ),
    "no type": (lambda f: set_config(f, dtype=None), "exactly one of dtype and torch_dtype, but holds neither"),
    "pickled weights": (lambda f: (f / "old.pdparams").write_bytes(b""), r"must not hold old\.pdparams"),
    "other width": (lambda f: set_config(f, hidden_size=64), r"FastDeploy stops here"),
    "other architecture": (lambda f: set_config(f, architectures=["Ernie"]), r"architectures \(Ernie\) must be one of"),
}


@pytest.mark.parametrize("defect", list(DEFECTS))
@pytest.mark.usefixtures("one_process")
def test_defects_are_refused_by_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    """A defect between writing and checking: the export fails, says what is wrong, and leaves
    nothing.
    """
    change, message = DEFECTS[defect]
    spoil(monkeypatch, change)
    with pytest.raises(ValueError, match=message):
        files_only(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_process")
def test_a_wrong_value_alone_is_seen_in_logits(base: Path, tmp_path: Path) -> None:
    """The second line of defence: with digests left out, the logits of the fresh process differ."""
    source = ExportSource(base)
    files_only(base, tmp_path / "out")
    transposed(tmp_path / "out")
    probes = run.made_up_probes(run.Processor.from_pretrained(base), vision=True)
    planned = run.look(run.model_of(Rounded(source)), probes)
    opened = verify.reopen(tmp_path / "out", "fastdeploy", source, None, probes=probes, digests=False)
    assert not opened.problems
    with pytest.raises(ValueError, match="logits of the reopened folder must equal"):
        verify.check_opened(opened, planned)


# --- inputs that cannot be exported ---------------------------------------------------------------


@pytest.mark.usefixtures("one_process")
def test_refuses_inputs(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"folders \(none\) must name a model folder"):
        files_only([], out)
    with pytest.raises(ValueError, match=r"must be an adapter .* give one model only"):
        files_only([base, base], out)
    lone = adapter_folder(base, tmp_path / "lone", **ADAPTERS["saved"])
    settings = json.loads((lone / "lora_config.json").read_text())
    (lone / "lora_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "tiny-a"}))
    with pytest.raises(ValueError, match=r"base_model_name_or_path \('tiny-a'\) must be a folder of weights"):
        files_only(lone, out)
    other = get_peft_model(AutoModel.from_pretrained(base), BottleneckConfig(4))
    other.save_pretrained(tmp_path / "bottleneck")
    with pytest.raises(ValueError, match="a Bottleneck adapter must stay beside its model"):
        files_only([base, tmp_path / "bottleneck"], out)
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"must hold tokenizer\.model"):
        files_only(bare, out)
    broken = shutil.copytree(base, tmp_path / "broken")

    def poison(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        if name == "model.norm.weight":
            value[3] = np.nan
        return name, value

    rewrite(broken, poison)
    with pytest.raises(ValueError, match=r"norm\.weight in .* must be finite"):
        files_only(broken, out)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "onnx"}, r"layout \('onnx'\) must be one of"),
        ({"quantization": "wint2"}, r"quantization \('wint2'\) must be one of"),
        ({"method": "nf4"}, r"method \('nf4'\) must be one of"),
        ({"emit": "cache"}, r"emit \(cache\) must go with a quantization"),
        ({"verify": "no"}, r"verify \('no'\) must be one of"),
        ({"quantization": "wint4", "layout": "hf"}, "must go with layout paddle or pt"),
        ({"quantization": "wint4", "method": "gptq"}, r"method \(gptq\) must come with calibration data"),
        ({"quantization": "wint4", "awq": 0.5}, r"awq \(0\.5\) must go with quantization wint4 or mix and with calib"),
        ({"quantization": "wint4", "awq": 2, "calib": "x"}, r"awq \(2\) must be from 0 to 1"),
        ({"target_tp": 0}, r"target_tp \(0\) must be at least 1"),
        ({"port": 65533}, r"port \(65533\) must be from 1 to 65532"),
        ({"quantization": "wint4", "target_tp": 7}, r"target_tp \(7\) must divide the input width"),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_refuses_options(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files_only(base, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_serve_script_runs_the_command_with_free_ports(base: Path, tmp_path: Path) -> None:
    files_only(base, tmp_path / "out", quantization="mix")
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = tmp_path / "out" / "serve.sh"
    done = subprocess.run(
        [script, "--extra", "1"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "PORT": "9000"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split("\n")
    assert words[:4] == ["-m", "fastdeploy.entrypoints.openai.api_server", "--model", str(tmp_path / "out")]
    given = dict(zip(words[2::2], words[3::2], strict=False))
    ports = [given[f] for f in ("--port", "--engine-worker-queue-port", "--metrics-port", "--cache-queue-port")]
    assert ports == ["9000", "9001", "9002", "9003"]
    assert json.loads(given["--quantization"]) == {
        "quantization": "mix_quant",
        "dense_quant_type": "wint8",
        "moe_quant_type": "wint4",
        "image_moe_quant_type": "wint8",
        "is_quantized": False,
    }
    assert given["--load-choices"] == "default_v1"
    assert json.loads(given["--mm-processor-kwargs"]) == {
        "image_min_pixels": 3136,
        "image_max_pixels": 4816896,
        "video_min_pixels": 234416,
        "video_max_pixels": 937664,
        "video_min_frames": 16,
        "video_max_frames": 180,
        "video_fps": 2,
        "video_frames_sample": "middle",
    }
    assert json.loads(given["--limit-mm-per-prompt"]) == {"image": 10, "video": 3}
    assert given["--extra"] == "1"

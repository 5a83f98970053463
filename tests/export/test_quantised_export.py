"""Quantised exports from end to end: codes through Paddle's operator on every expert, all numbers
in the report, gates that refuse, load caches.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import aligned_config, model_folder
from support.tiny_runs import mixed_rows, write_rows

from ernie_tune.checkpoint.tensors import TensorReader, widen_bfloat16
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.export import cache, grid, measure, reopen, run, verify
from ernie_tune.export import fastdeploy_rules as rules
from ernie_tune.export.choose import Chosen, Served
from ernie_tune.export.packing import pack, unpack
from ernie_tune.export.scheme import scheme
from ernie_tune.export.source import ExportSource, Rounded
from ernie_tune.peft.packed import load_packed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("quantised") / "base", aligned_config())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", mixed_rows(48))


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, reopen.main(*command[-2:]), "", "")

    monkeypatch.setattr(verify.subprocess, "run", call)


@pytest.mark.parametrize(
    ("method", "tp", "awq"), [("rtn", 1, 0.0), ("clip", 2, 0.0), ("gptq", 1, 0.0), ("clip", 1, 0.5)]
)
def test_wint4(base: Path, rows: str, tmp_path: Path, method: str, tp: int, awq: float) -> None:
    report = run.export(base, tmp_path / "out", quantization="wint4", method=method, calib=rows, target_tp=tp, awq=awq)
    checks = report["checks"]
    # modalities, matrices, experts: all of them
    assert checks["matrices_through_weight_quantize"] == 2 * 2 * 4
    assert report["notes"] == []
    errors = checks["layer_errors"]
    assert set(errors["ours"]) == {
        "attention",
        "dense feed-forward",
        "shared experts",
        "text experts",
        "vision experts",
    }
    # attention of two layers, a dense one, shared and routed experts
    assert len(errors["layers"]) == 4 * 2 + 3 + 3 + 4
    for kind in ("text experts", "vision experts"):
        ratio = errors["ours"][kind] / errors["rtn"][kind]
        assert ratio == 1 if method == "rtn" else ratio < 0.6
    assert 0 < checks["ours"]["kl"] < 0.01
    assert checks["ours"]["perplexity_before"] > 1
    assert ("awq" in checks) == bool(awq)
    for word in ("text experts", "logits: KL", "routers: same experts", "perplexity before"):
        assert word in report["table"]
    assert report["table"] in (tmp_path / "out" / "README.md").read_text()
    assert "--quantization wint4" in report["command"]
    assert f"--tensor-parallel-size {tp}" in report["command"]


def test_scores_before_and_after(base: Path, rows: str, tmp_path: Path) -> None:
    seen = []

    def score(model: Any, processor: Any) -> dict[str, float]:
        seen.append(model.layers[1].mlp.text_experts.down_proj.numpy().copy())
        return {"accuracy": 0.5 + 0.1 * len(seen)}

    report = run.export(base, tmp_path / "out", quantization="wint4", calib=rows, eval=rows, score=score)
    assert report["checks"]["scores"] == {
        "before": {"accuracy": 0.6},
        "rtn": {"accuracy": 0.7},
        "ours": {"accuracy": 0.8},
    }
    assert "accuracy (before 0.6000)" in report["table"]
    assert all((a != b).any() for a, b in ((seen[0], seen[1]), (seen[1], seen[2])))
    assert not any("accuracy" in note for note in report["notes"])


def test_a_score_below_rtns_is_noted(base: Path, rows: str, tmp_path: Path) -> None:
    left = [0.9, 0.75, 0.5]
    report = run.export(
        base, tmp_path / "out", quantization="wint4", calib=rows, score=lambda *_: {"f1": 1.0, "accuracy": left.pop()}
    )
    assert report["checks"]["scores"]["ours"]["accuracy"] == 0.9
    assert not any("is 0.9" in note for note in report["notes"])
    left = [0.5, 0.75, 0.9]
    report = run.export(
        base, tmp_path / "out", quantization="wint4", calib=rows, score=lambda *_: {"f1": 1.0, "accuracy": left.pop()}
    )
    (note,) = (note for note in report["notes"] if "rtn" in note)
    assert note.startswith("accuracy is 0.5000, rtn's is 0.7500")
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_packed_without_comparison(base: Path, tmp_path: Path) -> None:
    report = run.export(base, tmp_path / "out", quantization="mix", emit="packed")
    assert report["layout"] == "packed"
    assert report["checks"]["reopened_max_difference"] < 1e-4
    model = load_packed(tmp_path / "out")
    assert model.layers[1].mlp.text_experts.down_product.quant.bits == 4
    assert model.layers[1].mlp.vision_experts.down_product.quant.bits == 8
    assert "ernie-tune serve" in report["command"]


def test_a_narrow_model_gets_a_note(tmp_path: Path) -> None:
    report = run.export(model_folder(tmp_path / "base"), tmp_path / "out", quantization="wint8", verify="files")
    assert "text experts [96, 96]" in report["notes"][0]
    assert report["notes"][0] in (tmp_path / "out" / "README.md").read_text()


# --- gates ----------------------------------------------------------------------------------------


def test_a_lost_code_is_found_by_the_operator(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant of the search that allows scales above rtn's: its columns have no code of 7,
    FastDeploy would round them anew.
    """
    original = Chosen.grid

    def coarse(self: Chosen, name: str, expert: int | None) -> grid.Grid:
        made = original(self, name, expert)
        if made.bits == 4:
            scale = grid.settle(made.scale_SN * np.float32(1.4))
            made = grid.Grid(grid.nearest_codes(self.original(name, expert), scale, 4), scale, 4)
        return made

    monkeypatch.setattr(Chosen, "grid", coarse)
    with pytest.raises(
        ValueError,
        match=r"weight_quantize finds other codes than planned in layers\.1\.mlp\.text_experts\.up_gate_proj 0",
    ):
        run.export(base, tmp_path / "out", quantization="wint4", verify="files")
    assert list(tmp_path.iterdir()) == []


def test_a_method_worse_than_rtn_is_refused(
    base: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_tune.export import choose

    def worse(bits_KN: np.ndarray, weights: Any, shards: int = 1) -> grid.Grid:
        scale = grid.settle(grid.column_scales(bits_KN, 4, shards) * np.float32(0.4))
        return grid.Grid(grid.nearest_codes(bits_KN, scale, 4), scale, 4)

    monkeypatch.setattr(choose, "clip", worse)
    with pytest.raises(ValueError, match=r"output error of text experts .* must not exceed rtn's"):
        run.export(base, tmp_path / "out", quantization="wint4", calib=rows)
    assert list(tmp_path.iterdir()) == []


def test_gates_on_perplexity() -> None:
    equal = verify.LayerErrors({"text experts": 1.0}, {"text experts": 1.0})
    rtn = {"perplexity": 10.2, "perplexity_before": 10.0}
    assert (
        verify.gate(equal, {"perplexity": 10.04, "perplexity_before": 10.0}, {"perplexity": 10.0}, 4) == []
    )  # within noise
    assert verify.gate(equal, {"perplexity": 10.19, "perplexity_before": 10.0}, rtn, 4) == []
    assert "must not exceed rtn's" in verify.gate(equal, {"perplexity": 10.25, "perplexity_before": 10.0}, rtn, 4)[0]
    assert "must grow by at most 3.0%" in verify.gate(equal, {"perplexity": 10.4, "perplexity_before": 10.0}, rtn, 4)[0]
    assert "must grow by at most 0.5%" in verify.gate(equal, {"perplexity": 10.1, "perplexity_before": 10.0}, rtn, 8)[0]


def test_distances() -> None:
    """KL, agreement and perplexity of two tables worked out by hand."""
    p, q = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    a = measure.Look([p], 2 * np.log(2.0), 2, [np.array([[0, 1], [2, 3]])])
    b = measure.Look([q], 2 * np.log(3.0), 2, [np.array([[0, 1], [1, 3]])])
    found = measure.distance(a, b)
    assert found["kl"] == pytest.approx(0.5 * (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)))
    assert (found["top1"], found["router_agreement"]) == (0.5, 0.75)
    assert found["max_difference"] == pytest.approx(np.log(2))
    assert (found["perplexity_before"], found["perplexity"]) == (pytest.approx(2), pytest.approx(3))


# --- the load cache -------------------------------------------------------------------------------


def test_cache_names() -> None:
    """Check values made with FastDeploy's own function."""
    assert cache.cache_hash("ernie4_5_moe_vl", "mix_quant", 1, 1, 4) == "523e2cd03422ce88b188daa56b8d14e7"
    assert cache.cache_hash("ernie4_5_moe_vl", "wint8", 1, 1, 4) == "2841827fefc5eae7960ed89d9b2e271e"
    assert cache.cache_hash("ernie4_5_moe_vl", "mix_quant", 8, 1, 4) == "024771dbcefc3e4b9ce9dd67bd5e66e8"
    assert cache.cache_hash("ernie4_5_moe_vl", "wint8", 1, 1, 5) != cache.cache_hash(
        "ernie4_5_moe_vl", "wint8", 1, 1, 4
    )
    words = {"wint8": "wint8", "wint4": "mix_quant", scheme("mix").argument: "mix_quant"}
    assert {argument: cache.quantization_word(argument) for argument in words} == words


def test_cache_tree(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run.export(base, out, quantization="wint4", emit="cache", verify="files")
    assert report["command"].startswith("FD_ENABLE_MODEL_LOAD_CACHE=1 FD_USE_MACHETE=0 python -m fastdeploy")
    assert "export FD_USE_MACHETE=0" in (out / "serve.sh").read_text()
    ranks = sorted(out.glob(".cache/*/rank0"))
    assert len(ranks) == 2
    assert out / ".cache" / "523e2cd03422ce88b188daa56b8d14e7" / "rank0" in ranks
    reader = TensorReader(ranks[0])
    config = json.loads((out / "config.json").read_text())
    plain = {p.name for p in rules.parameters(config)}
    scales = {name for name in reader.entries if name.endswith("weight_scale")}
    assert set(reader.entries) == plain | scales
    experts = "ernie.layers.1.mlp.image_fused_moe.experts.up_gate_proj_weight"
    assert reader.shapes[experts] == (4, 128, 128)  # [E, N/2, K]
    assert reader.shapes[f"{experts}_scale"] == (4, 256)
    assert reader.shapes["ernie.layers.1.self_attn.qkv_proj.weight"] == (192, 128)  # int8 [N, K]
    assert reader.shapes["lm_head.linear.weight"] == (128, 640)
    chosen = Chosen(ExportSource(base), scheme("wint4"), "clip", 1)
    made = chosen.grid("layers.1.mlp.vision_experts.up_gate_proj", 3)
    np.testing.assert_array_equal(reader.read(experts)[3], pack(made.codes_KN, 4))
    # the same codes as the operator finds in the weights beside the cache
    weights = ExportSource(out)
    codes, _ = reopen.operator_codes(weights.read("layers.1.mlp.vision_experts.up_gate_proj", 3, "BF16"), 4, 1)
    np.testing.assert_array_equal(codes, made.codes_KN)


def test_cache_defects(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.export(base, out, quantization="wint4", emit="cache", verify="files")
    chosen = Chosen(ExportSource(base), scheme("wint4"), "clip", 1)
    assert cache.check_caches(out, chosen) == []
    rank = min(out.glob(".cache/*/rank0"))
    reader = TensorReader(rank)
    kept = {name: np.array(reader.read(name)) for name in reader.entries}
    codes = {name: reader.entries[name].dtype for name in kept}
    experts, norm = "ernie.layers.1.mlp.text_fused_moe.experts.down_proj_weight", "ernie.norm.weight"
    kept[experts] = np.ascontiguousarray(kept[experts][:, :, ::-1])
    kept["ernie.norm.scale"], codes["ernie.norm.scale"] = kept.pop(norm), "BF16"
    name = "ernie.layers.0.self_attn.o_proj.weight_scale"
    kept[name] = kept[name][:64]
    write_folder(rank, {n: (x.shape, codes[n]) for n, x in kept.items()}, kept.__getitem__)
    found = "\n".join(cache.check_caches(out, chosen))
    for text in (
        "ernie.norm.weight is missing",
        "ernie.norm.scale is unknown",
        f"{name} (BF16 [64]) must be BF16 [128]",
        f"codes of {experts} are not",
    ):
        assert text in found


def _dense(reader: TensorReader, name: str, bits: int, expert: int | None = None) -> np.ndarray:
    """A matrix as one rank multiplies with it, [K, N]."""
    codes, scale = reader.read(name), widen_bfloat16(np.array(reader.read(f"{name}_scale")))
    codes, scale = (codes, scale) if expert is None else (codes[expert], scale[expert])
    return unpack(np.array(codes), bits).astype(np.float32) * scale


def test_cache_of_two_ranks_computes_what_one_does(base: Path, tmp_path: Path) -> None:
    """Each rank's part of every kind of layer, from its file alone; their sums or rows of outputs
    against whole matrices.
    """
    out = tmp_path / "out"
    run.export(base, out, quantization="wint4", emit="cache", target_tp=2, verify="files")
    tree = out / ".cache" / cache.cache_hash("ernie4_5_moe_vl", "mix_quant", 2, 1, 4)
    ranks = [TensorReader(tree / f"rank{r}") for r in range(2)]
    source = ExportSource(base)
    served = Served(Chosen(source, scheme("wint4"), "clip", 2))
    rng = np.random.default_rng(0)

    def whole(name: str, expert: int | None = None) -> np.ndarray:
        return served.read(name, expert, "F32")

    def floats(name: str, axis: int) -> np.ndarray:
        return np.concatenate([widen_bfloat16(np.array(one.read(name))) for one in ranks], axis)

    x = rng.standard_normal((5, 128)).astype(np.float32)
    # experts: gate and up of the same inner columns meet on one rank
    stem = "ernie.layers.1.mlp.image_fused_moe.experts"
    total = np.zeros((5, 128), np.float32)
    for one in ranks:
        gate, up = np.split(x @ _dense(one, f"{stem}.up_gate_proj_weight", 4, 2), 2, 1)
        total += (gate / (1 + np.exp(-gate)) * up) @ _dense(one, f"{stem}.down_proj_weight", 4, 2)
    gate, up = np.split(x @ whole("layers.1.mlp.vision_experts.up_gate_proj", 2), 2, 1)
    wanted = (gate / (1 + np.exp(-gate)) * up) @ whole("layers.1.mlp.vision_experts.down_proj", 2)
    np.testing.assert_allclose(total, wanted, rtol=1e-4, atol=1e-4)
    # attention: a rank has whole heads, four of queries and the one of keys and values that they
    # share
    attention = "layers.0.self_attn"
    for rank, one in enumerate(ranks):
        q, k, v = np.split(x @ _dense(one, f"ernie.{attention}.qkv_proj.weight", 8), [64, 80], 1)
        np.testing.assert_allclose(
            q, (x @ whole(f"{attention}.q_proj.weight"))[:, 64 * rank : 64 * rank + 64], rtol=1e-4, atol=1e-4
        )
        for mine, letter in ((k, "k"), (v, "v")):
            all_heads = x @ whole(f"{attention}.{letter}_proj.weight")
            np.testing.assert_allclose(mine, all_heads[:, 16 * rank : 16 * rank + 16], rtol=1e-4, atol=1e-4)
    products = [
        x[:, 64 * r : 64 * r + 64] @ _dense(one, f"ernie.{attention}.o_proj.weight", 8) for r, one in enumerate(ranks)
    ]
    np.testing.assert_allclose(sum(products), x @ whole(f"{attention}.o_proj.weight"), rtol=1e-4, atol=1e-4)
    # what stays in bfloat16: words, the vision tower's heads and inner columns, the resampler's
    # first layer
    stored = Rounded(source)
    table = stored.read("embed_tokens.weight", None, "F32")
    np.testing.assert_array_equal(floats("ernie.embed_tokens.embeddings.weight", 0), table)
    np.testing.assert_array_equal(floats("lm_head.linear.weight", 1), table.T)
    block = "vision_model.blocks.1"
    width = 64
    for leaf in ("weight", "bias"):
        full = stored.read(f"{block}.attn.qkv.{leaf}", None, "F32").reshape(
            *(() if leaf == "bias" else (width,)), 3, width
        )
        got = [widen_bfloat16(np.array(one.read(f"{block}.attn.qkv.{leaf}"))) for one in ranks]
        halves = [part.reshape(*part.shape[:-1], 3, width // 2) for part in got]
        np.testing.assert_array_equal(np.concatenate(halves, -1), full)
        np.testing.assert_array_equal(
            floats(f"{block}.mlp.fc1.{leaf}", -1), stored.read(f"{block}.mlp.fc1.{leaf}", None, "F32")
        )
    for name in (f"{block}.attn.proj.weight", f"{block}.mlp.fc2.weight", "resampler_model.spatial_linear.0.weight"):
        np.testing.assert_array_equal(floats(name, 0), stored.read(name, None, "F32"))
    for name in (
        f"{block}.attn.proj.bias",
        "resampler_model.spatial_linear.2.weight",
        "ernie.layers.1.mlp.text_fused_moe.gate.weight",
    ):
        np.testing.assert_array_equal(ranks[0].read(name), ranks[1].read(name))
        assert (
            ranks[0].shapes[name]
            == {p.name: p.shape for p in rules.parameters(json.loads((out / "config.json").read_text()))}[name]
        )


def test_heads_fewer_than_ranks_are_held_by_several() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    rules.check_ranks(config, 4)
    columns = np.array(
        [[0, 1, 2, 3, 10, 11, 20, 21]]
    )  # four heads of queries, two of keys, two of values, each one wide
    held = [
        rules.share("ernie.layers.0.self_attn.qkv_proj.weight", columns, config, rank, 4).tolist() for rank in range(4)
    ]
    assert held == [[[0, 10, 20]], [[1, 10, 20]], [[2, 11, 21]], [[3, 11, 21]]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 6}, r"target_tp \(4\) must divide num_attention_heads \(6\)"),
        ({"num_key_value_heads": 3}, r"must divide, or be divided by, num_key_value_heads \(3\)"),
        ({"vision_config": {"num_heads": 6}}, r"must divide heads of the vision tower \(6\)"),
        ({"vocab_size": 66}, r"must divide vocab_size \(66\)"),
        ({"vocab_size": 68}, r"vocab_size \(68\) must be a multiple of 64 for a load cache of 4 ranks"),
    ],
)
def test_models_that_ranks_cannot_share_out(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules.check_ranks({"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128, **config}, 4)


def test_cache_refuses_what_could_not_be_checked(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input width \(32\) must be a multiple of 64"):
        run.export(base, tmp_path / "out", quantization="wint4", emit="cache", target_tp=4, verify="files")
    with pytest.raises(ValueError, match=r"input width \(96\) must be a multiple of 64"):
        run.export(
            model_folder(tmp_path / "narrow"), tmp_path / "out", quantization="wint4", emit="cache", verify="files"
        )

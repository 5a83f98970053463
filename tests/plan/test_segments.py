"""`pp_seg_method` against the official recipes' lists and Fleet's own segmenting;
and what is refused before anything is loaded.
"""

from __future__ import annotations

import pytest

from ernie_tune.config.arguments import build
from ernie_tune.config.checks import problems as contradictions
from ernie_tune.config.layout import Layout
from ernie_tune.config.loader import dump_config, load_text
from ernie_tune.models.presets import preset
from ernie_tune.plan.layouts import check_run
from ernie_tune.plan.memory import stage_layers
from ernie_tune.plan.segments import bounds_of


@pytest.mark.parametrize(
    ("method", "layers", "parts", "bounds"),
    [
        ((), 28, 2, ()),
        (("0", "13", "31"), 28, 2, (0, 13, 31)),  # 28B LoRA 128K: a lighter first stage
        (("0", "13"), 28, 2, (0, 13, 31)),
        # as `pp_seg_method=[0, 29, 57]` is split on a command line
        (("[0", "29", "57]"), 54, 2, (0, 29, 57)),
        (("12", "16"), 28, 2, (0, 13, 31)),
        (("layer:Ernie4_5_DecoderLayer|EmptyLayer",), 54, 6, (0, 10, 19, 28, 37, 46, 57)),
        (("uniform",), 28, 4, (0, 7, 15, 23, 31)),
        (("uniform",), 54, 2, (0, 28, 57)),
    ],
)
def test_bounds(method: tuple[str, ...], layers: int, parts: int, bounds: tuple[int, ...]) -> None:
    assert bounds_of(method, layers, parts) == bounds


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("method", ["uniform", "layer:DecoderLayer"])
def test_words_mean_what_they_mean_to_fleet(method: str, parts: int) -> None:
    from paddle import nn
    from paddle.distributed.fleet.meta_parallel import LayerDesc
    from paddle.distributed.fleet.meta_parallel.parallel_layers.pp_layers import SegmentLayers

    class DecoderLayer(nn.Layer):
        """By its name."""

    layers = 24 if parts != 5 else 25
    descs = [LayerDesc(nn.Linear), *[LayerDesc(DecoderLayer)] * layers, LayerDesc(nn.Linear), LayerDesc(nn.Linear)]
    assert list(bounds_of((method,), layers, parts)) == SegmentLayers(descs, parts, method).do_segment()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (("balanced",), r"pp_seg_method \(balanced\) must be uniform, layer:DecoderLayer, first items"),
        (("layer:Attention",), r"must count decoder layers.* set layer:DecoderLayer"),
        (("layer:DecoderLayer",), r"must give each of 3 parts as many of the 28 layers; list them, as \[10, 9, 9\]"),
        (("10", "10", "9"), r"must be 3 numbers of layers above 0 that add up to 28; for example \[10, 9, 9\]"),
        (("14", "14"), r"must be 3 numbers of layers above 0"),
        (("28", "0", "0"), r"must be 3 numbers of layers above 0"),
        (("0", "20", "10", "31"), r"must be 4 rising numbers from 0 to the 31 .* for example \[0, 11, 20, 31\]"),
        (("0", "10", "20", "30"), r"must be 4 rising numbers from 0 to the 31"),
    ],
)
def test_refusals(method: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounds_of(method, 28, 3)
    with pytest.raises(ValueError, match=message):
        check_run(
            build({"pipeline_model_parallel_size": 3, "pp_seg_method": method}).parallel,
            1,
            preset("ernie-4.5-vl-28b-a3b"),
        )


def test_more_parts_than_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uniform\) must have an item for each of 40 parts, not 31"):
        bounds_of(("uniform",), 28, 40)


def test_norm_and_head_stay_together_with_sequence_parallelism() -> None:
    settings = {
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pp_seg_method": ("0", "30", "31"),
    }
    with pytest.raises(
        ValueError, match=r"must leave norm and head on one stage .* begin the last part at 29 or before"
    ):
        check_run(build(settings).parallel, 1, preset("ernie-4.5-vl-28b-a3b"))
    check_run(build({**settings, "sequence_parallel": False}).parallel, 1, preset("ernie-4.5-vl-28b-a3b"))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("[0, 13, 31]", ("0", "13", "31")),
        ("uniform", ("uniform",)),
        ("layer:A_DecoderLayer|B", ("layer:A_DecoderLayer|B",)),
    ],
)
def test_yaml(written: str, words: tuple[str, ...]) -> None:
    loaded = load_text(f"pipeline_model_parallel_size: 2\npp_seg_method: {written}\n", "run.yaml")
    assert loaded.config.parallel.pp_seg_method == words
    assert load_text(dump_config(loaded.config), "again.yaml").config == loaded.config
    [note] = load_text(f"pp_seg_method: {written}\n", "run.yaml").notes
    assert str(note) == "run.yaml:1: pp_seg_method has no effect with pipeline_model_parallel_size 1"
    assert not contradictions(loaded.config)


def test_the_plan_knows_the_cut() -> None:
    assert [len(s) for s in stage_layers(28, Layout(pipe=2))] == [14, 14]
    assert [len(s) for s in stage_layers(28, Layout(pipe=2, segments=("0", "13", "31")))] == [12, 16]
    # four parts on two stages, in turn
    parts = stage_layers(6, Layout(pipe=2, virtual_pipe=2, segments=("1", "2", "2", "1")))
    assert parts == [[0, 3, 4], [1, 2, 5]]

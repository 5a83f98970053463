"""parallel/pipeline.py and parallel/balance.py without processes: where a pipeline is cut, what is
refused, how work is dealt out.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.source import Drawn, fill
from ernie_tune.machine.stages import item_costs, pipeline_items, stages_of
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.layers import has_values
from ernie_tune.models.presets import preset
from ernie_tune.parallel.balance import deal
from ernie_tune.parallel.pipeline import check_schedule, cut_at, cut_balanced
from ernie_tune.peft.config import LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.model import PeftModel


def worst(costs: list[float], bounds: tuple[int, ...]) -> float:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


def test_balanced_cut_is_the_best_of_all_cuts() -> None:
    rng = random.Random(5)
    for _ in range(60):
        n, parts = rng.randint(3, 9), rng.randint(1, 3)
        costs = [float(rng.choice([0, 1, 1, 2, 5])) for _ in range(n)]
        cut = cut_balanced([str(i) for i in range(n)], costs, parts)
        every = [(0, *inner, n) for inner in itertools.combinations(range(1, n), parts - 1)]
        best = min(worst(costs, bounds) for bounds in every)
        assert worst(costs, cut.bounds) == best
        # of the best, the one with the fewest items first
        assert cut.bounds == min(bounds for bounds in every if worst(costs, bounds) == best)


def test_balanced_cut_of_the_released_models() -> None:
    """For 28B the head costs 2.4 layers, so two stages are 15 + 13 or 16 + 12; for
    424B it costs one of 54 layers, and the official lists count 31 and 57 items.
    """
    small, large = preset("ernie-4.5-vl-28b-a3b"), preset("ernie-4.5-vl-424b-a47b")
    assert (len(pipeline_items(small)), len(pipeline_items(large))) == (31, 57)
    costs = item_costs(small)
    assert costs[-1] / costs[5] == pytest.approx(2.4, abs=0.05)
    # the dense layer costs as much as a sparse one
    assert costs[1] == pytest.approx(costs[5], rel=0.01)
    layers = [
        sum(name.startswith("layers.") for name in cut_balanced(pipeline_items(small), costs, 2).items_of(s))
        for s in (0, 1)
    ]
    assert layers in ([15, 13], [16, 12])
    costs = item_costs(large)
    assert costs[-1] / costs[10] == pytest.approx(1.0, abs=0.1)
    cut = cut_balanced(pipeline_items(large), costs, 4)
    assert worst(costs, cut.bounds) < 1.06 * sum(costs) / 4


def test_chunks_go_round_the_stages() -> None:
    cut = cut_at([*"abcdefgh"], [0, 1, 3, 4, 6, 7], stages=3, chunks=2)
    assert cut.bounds == (0, 1, 3, 4, 6, 7, 8)
    assert cut.chunks == 2
    assert [cut.items_of(s) for s in range(3)] == [("a", "e", "f"), ("b", "c", "g"), ("d", "h")]


@pytest.mark.parametrize("bounds", [[0, 13, 31], [0, 13]])
def test_official_lists(bounds: list[int]) -> None:
    items = pipeline_items(preset("ernie-4.5-vl-28b-a3b"))
    cut = cut_at(items, bounds, 2)
    assert cut.items_of(0)[-1] == "layers.11"
    assert cut.items_of(1)[0] == "layers.12"


@pytest.mark.parametrize("bounds", [[0, 31], [0, 13, 13], [1, 13, 31], [0, 13, 30], [0, 5, 13, 31], [0, 40]])
def test_a_list_that_is_no_cut_is_refused_with_one_that_is(bounds: list[int]) -> None:
    items = pipeline_items(preset("ernie-4.5-vl-28b-a3b"))
    with pytest.raises(
        ValueError, match=r"pp_seg_method .* must be 3 rising numbers from 0 to the 31 .* for example \[0, 16, 31\]"
    ):
        cut_at(items, bounds, 2)


def test_more_parts_than_items_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"pipeline_model_parallel_size \(4\) x virtual_pipeline_model_parallel_size \(2\) must not exceed the 6",
    ):
        cut_balanced(pipeline_items(preset("tiny-a")), item_costs(preset("tiny-a")), 4, 2)


@pytest.mark.parametrize(
    ("stages", "chunks", "accumulation", "message"),
    [
        (2, 2, 8, r"virtual_pipeline_model_parallel_size \(2\) must be 1 with pipeline_model_parallel_size \(2\)"),
        (4, 2, 5, r"gradient_accumulation_steps \(5\) must be .* \(4\) or at least twice .*; set 8"),
        (4, 2, 1, r"gradient_accumulation_steps \(1\) must be .*; set 4"),
    ],
)
def test_limits_of_interleaving(stages: int, chunks: int, accumulation: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(stages, chunks, accumulation)


def test_schedules_that_run() -> None:
    for stages, chunks, accumulation in [(2, 1, 1), (4, 1, 3), (4, 2, 4), (4, 2, 8), (3, 2, 11)]:
        check_schedule(stages, chunks, accumulation)


def test_dealt_pieces_are_all_there_and_even() -> None:
    rng = random.Random(3)
    for _ in range(50):
        sizes = [rng.randint(4, 900) for _ in range(rng.randint(0, 30))]
        ranks = rng.randint(1, 5)
        hands = deal(sizes, ranks)
        assert sorted(i for hand in hands for i in hand) == list(range(len(sizes)))
        loads = [sum(sizes[i] for i in hand) for hand in hands]
        assert max(loads) - min(loads) <= max(sizes, default=0)
    assert deal([100, 1, 1, 98], 2) == [[0], [3, 1, 2]]


# --- what a stage keeps of the model --------------------------------------------------------------


def test_stages_share_out_the_model_under_its_own_names() -> None:
    config = preset("tiny-c")  # untied
    whole = AutoModel.from_config(config, seed=1)
    cut = cut_balanced(pipeline_items(config), item_costs(config), 3)
    seen: list[str] = []
    for stage in range(3):
        part = ErnieModel(config)
        part.keep(stages_of(cut, stage))
        fill(part, Drawn(config, 1), where=lambda *_: ())  # drawn by name: the same on every layout
        values = dict(part.named_parameters())
        for name, value in values.items():
            assert (value == dict(whole.named_parameters())[name]).all()
        seen += [name for name in values if not name.startswith("vision_model.")]
        assert sum(name.startswith("vision_model.") for name in values) > 10
    assert sorted(seen) == sorted(n for n, _ in whole.named_parameters() if not n.startswith("vision_model."))


def test_a_tied_embedding_is_kept_first_and_last() -> None:
    config = preset("tiny-a")
    cut = cut_balanced(pipeline_items(config), item_costs(config), 3)
    for stage, (embedding, resampler) in enumerate([(True, True), (False, False), (True, False)]):
        model = PeftModel(ErnieModel(config), PromptConfig(2))
        model.keep(stages_of(cut, stage))
        names = {name for name, _ in model.named_parameters()}
        assert ("embed_tokens.weight" in names) is embedding
        # the head has no use for it
        assert ("embed_tokens.adapters.default.prompt" in names) is (stage == 0)
        assert any(name.startswith("resampler_model.") for name in names) is resampler


def test_adapters_go_with_their_layers() -> None:
    config = preset("tiny-a")
    model = PeftModel(ErnieModel(config), LoraConfig(r=2, target_modules=["attention"], modules_to_save=["norm"]))
    model.keep({"layers.1", "vision_model"})
    left = [name for name, value in model.named_parameters() if not value.stop_gradient]
    assert left
    assert all(name.startswith("layers.1.self_attn.") for name in left)
    with model.disable_adapter():  # finds every module that it switches
        assert model.active is None
    assert model.active == "default"
    assert model.adapters["default"].copies == {}


def test_a_part_of_a_model_refuses_to_run_alone() -> None:
    model = ErnieModel(preset("tiny-a"))
    model.keep({"layers.0"})
    with pytest.raises(ValueError, match="this rank holds a part of the model"):
        model.norm(None)


def test_prefixes_go_with_their_layers() -> None:
    model = PeftModel(ErnieModel(preset("tiny-a")), PrefixConfig(2))
    model.keep({"layers.2"})
    assert list(model.adapters["default"].places) == [f"layers.2.self_attn.{k}_proj" for k in "kv"]


@pytest.mark.parametrize("name", ["tiny-a", "tiny-c"])
def test_a_stage_reads_its_own_weights_and_holds_nothing_of_the_others(name: str, tmp_path: Path) -> None:
    config = preset(name)
    whole = AutoModel.from_config(config, seed=2)
    whole.save_pretrained(tmp_path)
    values = dict(whole.named_parameters())
    cut = cut_balanced(pipeline_items(config), item_costs(config), 3)
    for stage in range(3):
        stages = stages_of(cut, stage)
        for model in (
            AutoModel.from_pretrained(tmp_path, stages=stages),
            AutoModel.from_config(config, seed=2, stages=stages),
        ):
            filled = {n for n, p in model.named_parameters() if has_values(p)}
            # freezing and adapters find every name
            assert [n for n, _ in model.named_parameters()] == list(values)
            model.keep(stages)
            kept = dict(model.named_parameters())
            assert filled == set(kept)
            assert 0 < len(kept) < len(values)
            assert all((kept[n] == values[n]).all() for n in kept)

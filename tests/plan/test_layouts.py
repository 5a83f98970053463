"""plan/layouts.py: what can be cut and what cannot, said with both values and the nearest layouts
that work.
"""

from __future__ import annotations

import itertools
import re

import pytest
from planning import B28, B300, B424, settings

from ernie_tune.config.layout import Layout
from ernie_tune.models.presets import preset
from ernie_tune.plan.layouts import check_run, legal_layouts, nearest, problems, run_problems

# Official and peer layouts, experts over the tensor ranks where it says so.
OFFICIAL = (
    (B28, Layout(4, 2, expert=4, sequence_parallel=True)),
    (B28, Layout(2, 2, expert=2, sequence_parallel=True)),
    (B424, Layout(8, 2, expert=8, sequence_parallel=True)),
    (B424, Layout(4, 2, expert=4, sequence_parallel=True)),
    (B300, Layout(8, 5, expert=8, sequence_parallel=True)),
    (B300, Layout(8, 14, expert=8, sequence_parallel=True)),
    (B300, Layout(1, 12, sharding=168, expert=8, sharding_stage=1)),
    ("ernie-4.5-21b-a3b", Layout(sharding=8, expert=8, sharding_stage=1)),
)


@pytest.mark.parametrize(("name", "layout"), OFFICIAL, ids=str)
def test_official_layouts_are_legal(name: str, layout: Layout) -> None:
    assert problems(preset(name), layout, world=layout.world, accumulation=8) == []


@pytest.mark.parametrize(
    ("name", "layout", "known", "setting", "message"),
    [
        (B28, Layout(8), {}, "tensor_model_parallel_size", r"\(8\) must divide num_attention_heads \(20\); .* \[1, 2, 4\]"),
        (B28, Layout(8), {}, "tensor_model_parallel_size", r"\(8\) must divide num_key_value_heads \(4\)"),
        ("tiny-a", Layout(32), {}, "tensor_model_parallel_size", r"\(32\) must divide width of the shared expert|must divide"),
        (B28, Layout(sharding=3, expert=3, sharding_stage=1), {}, "expert_model_parallel_size", r"\(3\) must divide the experts of one modality \(64\)"),
        (B28, Layout(4, expert=2), {}, "expert_model_parallel_size", r"\(2\) must be a multiple of tensor_model_parallel_size \(4\)"),
        (B28, Layout(2, sharding=2, expert=8, sharding_stage=1), {}, "expert_model_parallel_size", r"\* replicas \(4\).*choose one of \[2, 4\]"),
        ("ernie-4.5-0.3b", Layout(sharding=2, expert=2, sharding_stage=1), {}, "expert_model_parallel_size", r"\(2\) must be 1 for a model without experts"),
        (B28, Layout(1, 31), {}, "pipeline_model_parallel_size", r"\(31\) .* parts that the model can be cut into \(30: .* at most 30"),
        (B28, Layout(1, 2, virtual_pipe=2), {}, "virtual_pipeline_model_parallel_size", r"\(2\) needs pipeline_model_parallel_size \(2\) above 2"),
        (B28, Layout(1, 4, virtual_pipe=2), {"accumulation": 6}, "gradient_accumulation_steps", r"\(6\) must be .* \(4\) or at least twice .* set 8"),
        (B28, Layout(1, 2, sharding=2, sharding_stage=2), {}, "sharding", r"\(stage2\) must be stage1 with pipeline_model_parallel_size \(2\)"),
        (B28, Layout(data=2, sharding_stage=1), {}, "sharding_parallel_size", r"\(1\) must be above 1 with sharding \(stage1\).* set it to 2"),
        (B28, Layout(data=2, offload=True), {}, "sharding", r"offload\) must not go with 2 data replicas; .* to 2"),
        (B28, Layout(2, expert=2), {"world": 3}, "tensor_model_parallel_size", r"= 2 must divide the number of processes \(3\); start 2"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, layout: Layout, known: dict[str, int], setting: str, message: str) -> None:
    found = problems(preset(name), layout, **known)
    assert [s for s, m in found if s == setting and re.search(message, m)], found


def test_tensor_degrees_of_the_released_models() -> None:
    """28B takes 1, 2, 4; 424B takes 1, 2, 4, 8."""
    for name, want in ((B28, {1, 2, 4}), (B424, {1, 2, 4, 8})):
        assert {t for t in range(1, 65) if not problems(preset(name), Layout(t))} == want


@pytest.mark.parametrize("name", [B28, B424, "tiny-a", "ernie-4.5-0.3b"])
@pytest.mark.parametrize("world", [1, 4, 6, 8, 64])
def test_legal_layouts_are_all_of_them(name: str, world: int) -> None:
    """Against every combination tried by the rules written out."""
    m = preset(name)
    want = set()
    for t, p, e in itertools.product(range(1, world + 1), repeat=3):
        if world % (t * p) or m.num_attention_heads % t or m.num_key_value_heads % t or m.vocab_size % t:
            continue
        if m.intermediate_size % t or (m.moe and m.moe.shared_intermediate_size % t) or p > m.num_hidden_layers:
            continue
        s = world // t // p
        if (m.moe.num_experts % e == 0 and e % t == 0 and t * s % e == 0) if m.moe else e == 1:
            want.add((t, p, s, e))
    assert {(x.tensor, x.pipe, x.sharding, x.expert) for x in legal_layouts(m, world)} == want


def test_nearest_are_legal_and_near() -> None:
    near = nearest(preset(B28), Layout(8, 1, expert=8), 8)
    assert [n.tensor for n in near] == [4, 4, 4]
    assert all(not problems(preset(B28), n, world=8) and n.world == 8 for n in near)


def test_settings_make_the_layout_again() -> None:
    for layout in legal_layouts(preset(B28), 16):
        assert Layout.of(settings(B28, **layout.settings()).parallel, 16) == layout


def test_a_run_is_checked_with_its_settings() -> None:
    good = settings(B28, tensor_parallel_degree=4, sequence_parallel="true", expert_parallel_degree=4)
    check_run(good.parallel, good.train.gradient_accumulation_steps, preset(B28), 8)
    assert Layout.of(good.parallel, 8).data == 2
    bad = settings(B28, tensor_parallel_degree=8, sequence_parallel="true")
    with pytest.raises(
        ValueError,
        match=r"\(8\) must divide num_key_value_heads \(4\)[^\n]*\n.*nearest layouts on 8 card\(s\)[^\n]*TP4",
    ):
        check_run(bad.parallel, bad.train.gradient_accumulation_steps, preset(B28), 8)
    (name, message), *_ = run_problems(settings(B28, context_parallel_degree=2).parallel, 1, preset(B28), 1)
    assert name == "context_parallel_size"
    assert "(2) must be 1" in message
    assert "use tensor_model_parallel_size with sequence_parallel" in message

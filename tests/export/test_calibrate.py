"""What calibration sees: second moments and samples of each layer's real inputs, each family of
experts with the tokens of its own modality.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from support.tiny_runs import mixed_rows, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.processor import Processor
from ernie_tune.export.calibrate import SAMPLE_ROWS, moments, samples
from ernie_tune.export.measure import Probe, load_inputs, made_up_probes, read_batches, save_inputs
from ernie_tune.models.inputs import pack
from ernie_tune.models.moe import RouterTap

LINEAR, UP, DOWN = (
    "layers.1.self_attn.q_proj.weight",
    "layers.1.mlp.{}_experts.up_gate_proj",
    "layers.1.mlp.{}_experts.down_proj",
)
NAMES = [LINEAR, *(name.format(m) for m in ("text", "vision") for name in (UP, DOWN))]


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    made = AutoModel.from_config("tiny-a", seed=1)
    made.eval()
    return made


def inputs(count: int, pictures: bool):  # type: ignore[no-untyped-def]
    processor = Processor.bundled("tiny")
    rows = [r for r in mixed_rows(3 * count) if bool(r.get("images")) == pictures][:count]
    return pack([processor.encode(r["messages"], r.get("images")).row for r in rows], processor.tokens)


def test_moments_are_those_of_the_inputs(model) -> None:  # type: ignore[no-untyped-def]
    """The norm's output is the input of q; experts get the rows that the router sends them, as many
    as it chose.
    """
    given = [inputs(3, True), inputs(5, False)]
    seen, hidden = moments(model, given, NAMES), []
    hook = model.layers[1].input_layernorm.register_forward_post_hook(lambda _, __, out: hidden.append(out.numpy()))
    counts = np.zeros((2, 8), int)
    with paddle.no_grad():
        for one in given:
            tap = RouterTap(keep=True)
            model(one, tap=tap)
            for record in tap.records:
                if record.layer == 1:
                    counts[record.modality] += np.bincount(record.chosen_Tk.numpy().ravel(), minlength=8)
    hook.remove()
    x_TK = np.concatenate(hidden)
    np.testing.assert_allclose(seen[LINEAR, None].total, x_TK.T @ x_TK, rtol=1e-4, atol=1e-3)
    assert seen[LINEAR, None].tokens == len(x_TK)
    for m, modality in enumerate(("text", "vision")):
        for name in (UP, DOWN):
            found = [
                seen[name.format(modality), e].tokens if (name.format(modality), e) in seen else 0 for e in range(8)
            ]
            assert found == counts[m].tolist()
    assert seen[DOWN.format("text"), int(counts[0].argmax())].total.shape == (48, 48)


def test_text_alone_says_nothing_of_vision_experts(model) -> None:  # type: ignore[no-untyped-def]
    seen = moments(model, [inputs(4, False)], NAMES)
    assert {name for name, _ in seen} == {LINEAR, UP.format("text"), DOWN.format("text")}


def test_wide_layers_keep_the_diagonal(model, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from ernie_tune.export import calibrate

    given = [inputs(2, True)]
    full = moments(model, given, [LINEAR])
    monkeypatch.setattr(calibrate, "FULL_MOMENT_ROWS", 64)
    np.testing.assert_allclose(
        moments(model, given, [LINEAR])[LINEAR, None].total, np.diagonal(full[LINEAR, None].total), rtol=1e-5
    )
    assert moments(model, given, [LINEAR], full=True)[LINEAR, None].total.ndim == 2


def test_samples(model) -> None:  # type: ignore[no-untyped-def]
    given = [inputs(4, True)] * 3
    seen = samples(model, given, NAMES)
    assert len(seen[LINEAR, None]) == min(SAMPLE_ROWS, 3 * given[0].num_tokens)
    assert seen[UP.format("vision"), min(e for n, e in seen if n == UP.format("vision"))].shape[1] == 96
    # nothing is left behind
    assert not [hook for layer in model.sublayers() for hook in layer._forward_pre_hooks]


def test_inputs_survive_the_way_to_another_process(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for probe in (made_up_probes(Processor.bundled("tiny"), vision=True)[0], Probe(inputs(2, False), np.array([0, 3]))):
        save_inputs(tmp_path / "probe.npz", probe)
        back, rows = load_inputs(tmp_path / "probe.npz")
        np.testing.assert_array_equal(rows, probe.rows_N)
        for name, value in vars(probe.inputs).items():
            np.testing.assert_array_equal(vars(back)[name], value)


def test_rows_of_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    processor = Processor.bundled("tiny")
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(40))
    assert [b.num_rows for b in read_batches(rows, processor, 40)] == [16, 16, 8]
    assert [b.num_rows for b in read_batches(rows, processor, 16, parts=8)] == [2] * 8
    write_rows(
        tmp_path / "long.jsonl",
        [{"messages": [{"role": "user", "content": "a " * 5000}, {"role": "assistant", "content": "b"}]}],
    )
    with pytest.raises(ValueError, match="must hold a row that can be used"):
        read_batches(str(tmp_path / "long.jsonl"), processor, 4)

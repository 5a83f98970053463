"""train/reference.py: which mode is chosen, a cache that is whole or absent and knows its origin,
references that move, and what they refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.judged_rows import pairs, units
from support.tiny_runs import processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.state import read_values, write_values
from ernie_tune.data.units import collate_units
from ernie_tune.peft.config import BottleneckConfig, LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.train.reference import (
    LogpCache,
    Reference,
    choose_mode,
    frozen_logp,
    identity_of,
    is_fresh,
    start_difference,
    weights_hash,
)


def adapted(**changes: Any) -> Any:
    model = get_peft_model(AutoModel.from_config("tiny-a", seed=1), LoraConfig(r=4, **changes))
    return model


def moved(model: Any) -> Any:
    """The model after its trained parameters went somewhere."""
    for value in model.parameters():
        if not value.stop_gradient:
            value.set_value(value + 0.02)
    return model


def test_the_rule(tmp_path: Path) -> None:
    plain = AutoModel.from_config("tiny-a")
    assert choose_mode("auto", plain) == "model"
    assert choose_mode("precomputed", plain) == "precomputed"
    assert choose_mode("auto", adapted()) == "adapter_off"
    assert choose_mode("auto", adapted(), moving=True) == "adapter_ref"
    assert choose_mode("auto", moved(adapted())) == "adapter_ref"
    assert choose_mode("adapter_off", moved(adapted())) == "adapter_off", "asked for, so given"
    assert not is_fresh(adapted(modules_to_save=["embed_tokens"])), "copies may have been trained"
    assert is_fresh(get_peft_model(AutoModel.from_config("tiny-a"), BottleneckConfig(8)))
    for mode in ("adapter_off", "adapter_ref"):
        with pytest.raises(ValueError, match=rf"ref_mode \({mode}\) must go with a model that has an adapter"):
            choose_mode(mode, plain)
    with pytest.raises(ValueError, match=r"ref_mode \(model\) must go with a model that is trained itself"):
        choose_mode("model", adapted())


@pytest.mark.parametrize("kind", ["model", "adapter_off", "adapter_ref"])
def test_the_reference_stays_where_the_policy_started(tmp_path: Path, kind: str) -> None:
    model = AutoModel.from_config("tiny-a", seed=1) if kind == "model" else adapted()
    if kind == "adapter_ref":
        moved(model)
    batch = collate_units(units(tmp_path, pairs(3)), processor())
    start = frozen_logp(model, batch)
    trained = [name for name, p in model.named_parameters() if not p.stop_gradient]
    reference = Reference(model, kind)
    assert [name for name, p in model.named_parameters() if not p.stop_gradient] == trained, "nothing else is trained"
    np.testing.assert_allclose(reference.compute(batch), start, atol=1e-6)
    assert start_difference(model, reference.attached(batch)) < 1e-5
    moved(model)
    reference.cache.values.clear()
    attached = reference.attached(batch)
    np.testing.assert_allclose(attached.columns["ref_logp_N"], start, atol=1e-6)
    assert start_difference(model, attached) > 1e-2
    assert np.abs(frozen_logp(model, batch) - start).max() > 1e-3, "the policy acts again"
    if kind != "adapter_off":
        reference.update(1.0)
        np.testing.assert_allclose(
            reference.attached(batch).columns["ref_logp_N"], frozen_logp(model, batch), atol=1e-6
        )
        write_values(tmp_path / "kept", reference.moving())
        before = reference.compute(batch)
        moved(model)
        reference.update(0.5)
        assert np.abs(reference.compute(batch) - before).max() > 1e-4
        read_values(tmp_path / "kept", reference.moving())
        np.testing.assert_allclose(reference.compute(batch), before, atol=1e-7)


def test_a_reference_is_computed_once_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModel.from_config("tiny-a", seed=1)
    reference = Reference(model, "model")
    made = units(tmp_path, pairs(4))
    calls = []
    compute = Reference.compute
    monkeypatch.setattr(Reference, "compute", lambda self, batch: calls.append(1) or compute(self, batch))
    first = reference.attached(collate_units(made, processor())).columns["ref_logp_N"]
    assert first is not None
    again = reference.attached(collate_units(made[::-1], processor()))
    assert calls == [1]
    lengths = [sum(d.num_trained for d in u.dialogues) for u in made]
    parts = np.split(first, np.cumsum(lengths)[:-1])
    assert np.array_equal(again.columns["ref_logp_N"], np.concatenate(parts[::-1]))  # type: ignore[arg-type]
    assert Reference(model, "none").attached(again) is again


def test_the_cache_file(tmp_path: Path) -> None:
    cache = LogpCache({"model": "m", "template": "t"})
    cache.add(["a" * 32, "b" * 32], [2, 1], np.array([-1.0, -2.0, -3.0]))
    cache.add(["a" * 32], [2], np.array([9.0, 9.0]))
    cache.save(tmp_path / "deep" / "logps.npz")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["logps.npz"]
    other = LogpCache({"model": "m", "template": "t"})
    other.load(tmp_path / "deep" / "logps.npz")
    found = other.lookup(["b" * 32, "a" * 32])
    assert found is not None
    assert found.tolist() == [-3.0, -1.0, -2.0], "the first value stays"
    assert other.lookup(["a" * 32, "c" * 32]) is None
    with pytest.raises(ValueError, match=r"another model and template .m. and must be of this run's .n."):
        LogpCache({"model": "n", "template": "u"}).load(tmp_path / "deep" / "logps.npz")
    LogpCache({}).save(tmp_path / "empty.npz")
    LogpCache({}).load(tmp_path / "empty.npz")


def test_an_identity_names_the_policy_the_template_and_the_pixels() -> None:
    model = AutoModel.from_config("tiny-a", seed=1)
    first = identity_of(model, processor())
    assert set(first) == {"model", "template", "image preprocessing"}
    assert weights_hash(AutoModel.from_config("tiny-a", seed=1)) == first["model"]
    assert weights_hash(AutoModel.from_config("tiny-a", seed=2)) != first["model"]
    small = processor()
    other = type(small).bundled("tiny", max_pixels=4096)
    assert identity_of(model, other)["image preprocessing"] != first["image preprocessing"]
    assert identity_of(model, type(small).bundled("tiny", "ernie_vl"))["template"] != first["template"]
    adapter = adapted()
    before = weights_hash(adapter)
    value = next(p for n, p in adapter.named_parameters() if n.endswith("lora_B"))
    value.set_value(value + paddle.ones_like(value))
    assert weights_hash(adapter) != before


def test_another_adapter_acts_for_a_while() -> None:
    model = moved(adapted())
    model.add_like("default", "other")
    model.mix_adapter("default", "other", 1.0)
    assert model.active == "default"
    with model.acting("other"):
        assert model.active == "other"
    assert model.active == "default"
    with pytest.raises(ValueError, match=r"adapter name \('none'\) must be one of"), model.acting("none"):
        pass

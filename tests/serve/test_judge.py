"""`ernie-tune serve` as the judge of sampled answers."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import _golden_model
from live import DIGIT, live

from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.generate.engine import Engine
from ernie_tune.rewards.endpoint import EndpointJudge
from ernie_tune.rewards.functions import Answered


def test_a_served_model_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked with the picture and the answer; what it says is no number, and counted so."""
    engine, seen, prepare = Engine(_golden_model("tiny-b", "float32"), Processor.bundled("tiny")), [], Engine.prepare
    record = Record("prompt", ({"role": "user", "content": "<image>which digit is it?"},), (str(DIGIT),))

    def prepared(self: Engine, *given: Any, **more: Any) -> Any:
        seen.append(prepare(self, *given, **more))
        return seen[-1]

    monkeypatch.setattr(Engine, "prepare", prepared)
    with live(engine) as server:
        judge = EndpointJudge(f"judge:{server.root}/v1?model=ernie&max_tokens=2&retries=0")
        assert judge([(record, [Answered("a three")])]) == [[None]]
    assert (judge.asked.errors, judge.asked.timeouts) == (1, 0)
    (one,) = seen
    assert one.prompt.row.pixel_values_PC is not None
    assert "a three" in engine.processor.decode(one.prompt.row.input_ids_L.tolist())

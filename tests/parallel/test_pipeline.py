"""parallel/pipeline.py, machine/stages.py and machine/tower.py on real processes against one
process: losses, gradients, five clipped steps of AdamW.

Each launch runs several cases (`pipeline_worker.py`), and cases from which a remedy for one of
Fleet's traps was taken away.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launching import launch

WORKER = Path(__file__).parent / "pipeline_worker.py"
Found = dict[str, list[dict[str, float]]]  # case -> what each rank found


def found(folder: Path, plan: dict[str, Any]) -> Found:
    """What every rank found in every case."""
    code, logs = launch(folder, plan["pipe"], WORKER, str(folder), json.dumps(plan))
    assert code == 0, logs
    ranks = [json.loads((folder / f"{r}.json").read_text()) for r in range(plan["pipe"])]
    return {name: [rank[name] for rank in ranks] for name in plan["cases"]}


def check_equal(ranks: list[dict[str, float]]) -> None:
    for rank in ranks:
        assert rank["clipped"] == 1.0, "the norm must be above the limit at every step, or it could be wrong unseen"
        assert rank["moved"] > 1e-2
        for number in ("gradient", "loss", "grad_norm", "metrics", "parameters"):
            assert rank[number] < 1e-5, (number, rank)
        for number in ("scores", "logp", "answers"):
            assert rank.get(number, 0.0) < 1e-5, (number, rank)
    assert max(rank["largest gradient"] for rank in ranks) > 1e-3


TWO = {
    "tied, images in some, trained tower, router losses, recompute": {
        "router": True, "recompute": True, "inference": True,
    },
    "untied, frozen tower, explicit cut": {
        "tied": False, "freeze": {"freeze_config": "freeze_vision"}, "bounds": [0, 2, 7], "micro_batches": 3,
    },
    "text only window, one micro-batch": {"images": False, "micro_batches": 1, "bounds": [0, 1]},
    "lora, frozen embedding, recompute": {"method": "lora", "recompute": True, "inference": True},
    "nothing trained on the first stage": {"freeze": {"trainable": ["3"]}, "recompute": True, "bounds": [0, 3], "steps": 2},
    "dora, parameters trained in full": {"method": "dora", "only_own_weights": False, "steps": 2},
    "dora, each stage reads its own weights": {"method": "dora", "steps": 2},
    "lora on a quantised base": {"method": "lora", "quantised": "weight_only_mix", "tied": False, "inference": True, "steps": 2},
    "lora on a quantised, tied base": {"method": "lora", "quantised": "weight_only_int8", "steps": 2},
    "prefix": {"method": "prefix", "inference": True, "steps": 2},
    "prompt": {"method": "prompt", "inference": True, "recompute": True, "steps": 2},
    "mutant: tied gradients stay apart": {"mutant": "tied gradients stay apart", "steps": 1},
    "mutant: mean over micro-batches": {"mutant": "mean over micro-batches", "steps": 1},
    "mutant: tower is not run again": {"mutant": "tower is not run again", "steps": 1},
    "mutant: tower gradients stay apart": {"mutant": "tower gradients stay apart", "steps": 1},
    "mutant: tower and head counted everywhere": {"mutant": "tower and head counted everywhere", "steps": 1},
}  # fmt: skip
FOUR = {
    "two chunks": {"layers": 6, "accumulation": 8, "router": True, "inference": True},
    "two chunks, window too short": {"layers": 6, "accumulation": 8, "micro_batches": 3, "tied": False, "router": True, "steps": 2},
    "two chunks, forward then backward": {"layers": 6, "accumulation": 4, "recompute": True, "steps": 2},
    "mutant: router losses on every filler": {
        "layers": 6, "accumulation": 8, "micro_batches": 3, "router": True, "steps": 1,
        "mutant": "router losses on every filler",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found(tmp_path_factory.mktemp("two"), {"pipe": 2, "cases": TWO})


@pytest.fixture(scope="module")
def four_stages(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found(tmp_path_factory.mktemp("four"), {"pipe": 4, "chunks": 2, "cases": FOUR})


@pytest.mark.parametrize("case", [name for name in TWO if "mutant" not in name])
def test_two_stages_equal_one_process(case: str, two_stages: Found) -> None:
    check_equal(two_stages[case])


@pytest.mark.parametrize("case", [name for name in FOUR if "mutant" not in name])
def test_interleaved_stages_equal_one_process(case: str, four_stages: Found) -> None:
    check_equal(four_stages[case])


def test_four_stages_equal_one_process(tmp_path: Path) -> None:
    plan = {"pipe": 4, "cases": {"tied": {"inference": True}, "fewer micro-batches than stages": {"micro_batches": 2}}}
    for ranks in found(tmp_path, plan).values():
        check_equal(ranks)


def test_the_first_block_learns_over_a_frozen_embedding(two_stages: Found) -> None:
    """Trap p: with recompute, its input must need a gradient."""
    first = two_stages["lora, frozen embedding, recompute"][0]
    assert first["trained"] > 10
    assert first["moved"] > 1e-2


@pytest.mark.parametrize("trap", [name for name in TWO if "mutant" in name and "counted" not in name])
def test_without_its_remedy_the_gradient_is_wrong(trap: str, two_stages: Found) -> None:
    """Trap t, the tied weight, and both passes of the tower."""
    assert max(rank["gradient"] for rank in two_stages[trap]) > 1e-4


def test_fillers_must_count_nothing(four_stages: Found) -> None:
    assert max(rank["gradient"] for rank in four_stages["mutant: router losses on every filler"]) > 1e-5


def test_what_several_stages_hold_is_counted_once_in_the_norm(two_stages: Found) -> None:
    """Traps d and w: the gradient is right, the norm and with it the clipped step are not."""
    for rank in two_stages["mutant: tower and head counted everywhere"]:
        assert rank["gradient"] < 1e-5
        assert rank["grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"mutant": "boundaries keep their length"}, "send_shape_message"),  # trap q
        (  # traps p and u
            {"freeze": {"trainable": ["3"]}, "bounds": [0, 3], "images": False, "mutant": "frozen below"},
            "sent nothing to rank 0",
        ),
        # trap u
        ({"mutant": "one stage has another window"}, r"micro-batches of stage 1 \(3, tokens"),
    ],
)
def test_without_its_remedy_the_ranks_cannot_go_on(
    case: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERNIE_TUNE_COMM_TIMEOUT_S", "6")
    plan = {"pipe": 2, "cases": {"mutant": case}}
    code, logs = launch(tmp_path, 2, WORKER, str(tmp_path), json.dumps(plan))
    assert code != 0
    assert re.search(message, logs), logs

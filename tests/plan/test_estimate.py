"""`ernie_tune.estimate` and its verb: what is chosen, said, refused; that it is quick and loads no
paddle; what to change where nothing fits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from planning import ATTENTION, B28, B424, EVERYWHERE, job, settings

import ernie_tune
from ernie_tune.cli.main import main
from ernie_tune.config.layout import Layout
from ernie_tune.models.presets import preset
from ernie_tune.plan.cards import CARDS, GB, card
from ernie_tune.plan.estimate import estimate
from ernie_tune.plan.layouts import legal_layouts
from ernie_tune.plan.memory import memory
from ernie_tune.plan.search import best, changes_that_fit, plans, smallest
from ernie_tune.plan.time import step_time

CARD = card("80g")
ROOT = Path(__file__).parents[2]


def test_the_fewest_cards_for_a_named_model() -> None:
    e = ernie_tune.estimate("baidu/ERNIE-4.5-VL-28B-A3B-Paddle")
    assert (e.fits, e.searched, e.plan.layout) == (True, True, Layout())
    assert estimate(B424).plan.layout.world == 16
    assert estimate(B424, weight_quantize_algo="weight_only_mix").plan.layout.world == 4
    assert estimate(B28, card="v100-32g").plan.layout.world == 4


def test_the_best_layout_is_the_fastest_that_fits() -> None:
    j = job(B28, **EVERYWHERE)
    found = best(j, CARD, 8)
    for layout in legal_layouts(preset(B28), 8):
        held, speed = memory(j, layout, CARD).total, step_time(j, layout, CARD)
        assert speed is not None
        if held <= 0.93 * CARD.memory_bytes:
            assert speed.tokens_per_second_per_card <= found.speed + 1e-9
    assert found.fits
    assert not found.tight
    ranked = plans(job(B424, **EVERYWHERE), CARD, 8)
    assert [p.memory.total for p in ranked] == sorted(p.memory.total for p in ranked), (
        "nothing fits: by what is lacking"
    )


def test_changes_make_it_fit() -> None:
    """Each set of changes, applied to the settings, gives a job that fits; none contains
    another.
    """
    j = job(B424, **EVERYWHERE)
    found = changes_that_fit(j, CARD, 8)
    assert ("weight_quantize_algo: weight_only_mix",) in found
    assert ("16 cards instead of 8",) in found
    assert len(found) <= 3
    assert not [(a, b) for a in found for b in found if set(a) < set(b)]
    assert best(job(B424, **EVERYWHERE, weight_quantize_algo="weight_only_mix"), CARD, 8).fits
    assert best(j, CARD, 16).fits
    several = changes_that_fit(job(B28, **EVERYWHERE), card("40g"), 1)
    assert several
    for texts in several:
        if all("cards" not in t for t in texts):
            given = {**EVERYWHERE, **dict(t.split(": ", 1) for t in texts)}
            assert best(job(B28, **given), card("40g"), 1).fits, texts


def test_smallest_stops_where_it_fits() -> None:
    assert smallest(job(B28, **ATTENTION), CARD).layout.world == 1
    assert smallest(job(B28, **EVERYWHERE), CARD).layout.world == 2


def test_a_file_is_judged_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {B28}\ndataset: a.jsonl\nbf16: true\nrecompute: true\npipeline_parallel_degree: 4\nmax_seq_len: 4096\n"
    )
    e = estimate(file)
    assert (e.plan.layout, e.searched) == (Layout(1, 4), False)
    assert e.better is not None, "one micro-batch over four stages is mostly bubble"
    assert "better on as many cards" in str(e)
    assert estimate(file, cards=8).plan.layout.data == 2
    assert estimate(file, row_tokens=1024).job.tokens == 1024
    assert estimate(settings(B28, recompute="true")).plan.layout == Layout()
    with pytest.raises(ValueError, match=r"= 4 must divide the number of processes \(6\)"):
        estimate(file, cards=6)
    with pytest.raises(ValueError, match=r"row_tokens \(5000\) must be between 1 and max_seq_len \(4096\)"):
        estimate(file, row_tokens=5000)
    with pytest.raises(
        ValueError, match=r"visual_tokens \(5000\) must be between 0 and the tokens of a micro-batch \(4096\)"
    ):
        estimate(file, visual_tokens=5000)
    file.write_text("modle: x\n")
    with pytest.raises(ValueError, match=r"run.yaml:1: unknown key"):
        estimate(file)


def test_a_folder_is_read(tmp_path: Path) -> None:
    from ernie_tune.models.config_dialects import write_config

    (tmp_path / "config.json").write_text(json.dumps(write_config(preset(B28), "paddle")))
    assert estimate(str(tmp_path)).as_dict()["parameters"] == 29_399_294_336


def test_small_models_are_planned_for_this_machine() -> None:
    e = estimate("tiny-a", fine_tuning="Full", max_seq_len=512)
    assert e.card.is_cpu
    assert e.job.element_bytes == 4
    assert e.plan.time is None
    assert "the speed of this CPU is not known here" in str(e)


def test_cards() -> None:
    assert card("H100").name == "h100-80g"
    assert card("A100-40GB").memory_bytes == 40 * GB
    assert card("24g").memory_bytes == 24 * GB
    assert card("cpu-8g").is_cpu
    assert all(c.memory_bytes > 0 and c.peak_flops > 0 for c in CARDS.values())
    with pytest.raises(ValueError, match=r"card \('h810'\) must be one of .*; did you mean 'h800-80g'\?"):
        card("h810")
    with pytest.raises(ValueError, match=r"card \('cpu-big'\) must give its memory in GB"):
        card("cpu-big")


def test_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", B424, "cards=8"]) == 0
    said = capsys.readouterr().out
    for words in (
        "memory of one card, GB",
        "optimizer",
        "total",
        "DOES NOT FIT",
        "it would fit with",
        "weight_only_mix",
        "MFU",
        "disk",
    ):
        assert words in said, words
    assert main(["estimate", B28, "card=v100-32g", "cards=4"]) == 0
    assert "v100-32g has no bfloat16" in capsys.readouterr().out
    assert main(["estimate", B28, "--json", "lora_expert_affinity=0.5"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["total_bytes_per_card"] == pytest.approx(sum(numbers["bytes_per_card"].values()))
    assert numbers["notes"][0].startswith("lora_expert_affinity is measured when training starts")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["estimate"], 2, "expected one model or YAML file, got 0"),
        (["estimate", "a", "b"], 2, "expected one model or YAML file, got 2"),
        (["estimate", B28, "cards=x"], 2, "cards (x) must be a whole number of at least 1"),
        (["estimate", B28, "visual_tokens=-1"], 2, "visual_tokens (-1) must be a whole number of at least 0"),
        (["estimate", "no-such-model"], 1, "preset ('no-such-model') must be one of"),
        (
            ["estimate", B28, "lerning_rate=1"],
            1,
            "command line: unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        ),
    ],
)
def test_wrong_command_lines(args: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == code
    assert capsys.readouterr().err.startswith(message)


def test_loads_neither_paddle_nor_numpy() -> None:
    """The imports of either take longer than the verb's own work; how long that takes is for a
    benchmark.
    """
    code = (
        "import sys\n"
        "from ernie_tune.cli.main import main\n"
        f"assert main(['estimate', '{B424}', 'cards=8']) == 0\n"
        "print([m for m in ('paddle', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

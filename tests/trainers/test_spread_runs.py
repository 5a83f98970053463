"""A run under a layout is the run on one process: its losses, its weights, what it leaves; resumed
under another layout; ended when a rank is killed.

ERNIE_TUNE_PAIRS=40 and ERNIE_TUNE_KILLS=20 try so many pairs of layouts and kills; by default a
few.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_runs import mixed_rows, write_rows

from ernie_tune.config.arguments import build
from ernie_tune.machine import place
from ernie_tune.machine.place import layout_of_run
from ernie_tune.parallel.watch import Watch
from ernie_tune.trainers.keeper import StreamPart

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
LAYOUTS: dict[str, tuple[str, ...]] = {
    "TP2": ("tensor_model_parallel_size=2",),
    "TP2+SP EP2": ("tensor_model_parallel_size=2", "sequence_parallel=true", "expert_model_parallel_size=2"),
    "PP2": ("pipeline_model_parallel_size=2",),
    "sharding 2": ("sharding=stage1", "sharding_parallel_size=2", "gradient_accumulation_steps=1"),
    "sharding 3": (
        "sharding=stage3",
        "sharding_parallel_size=2",
        "gradient_accumulation_steps=1",
        "recompute=true",
    ),
    "EP2 sharding 2": (
        "expert_model_parallel_size=2",
        "sharding=stage1",
        "sharding_parallel_size=2",
        "gradient_accumulation_steps=1",
    ),
    "DP2": ("gradient_accumulation_steps=1", "--nproc", "2"),
    "TP2 PP2 SP": ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "sequence_parallel=true"),
    "one process": (),
}
LORA = ("fine_tuning=LoRA", "lora_target_modules=all-linear", "lora_experts=both", "learning_rate=1e-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and the settings of a run of six steps; runs go into folders of their own beside
    them.
    """
    here = tmp_path_factory.mktemp("layouts")
    settings = {
        "train_dataset_path": write_rows(here / "train.jsonl", mixed_rows(24)),
        "eval_dataset_path": write_rows(here / "eval.jsonl", mixed_rows(4)),
        "max_seq_len": 512,
        "model_name_or_path": "tiny-a",
        "fine_tuning": "Full",
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,
        # AdamW makes a step of the rounding of a gradient near zero: in float32 no bound on
        # parameters holds
        "float64": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_max_new_tokens": 4,
        "save_steps": 3,
        "plot_loss": False,
    }
    (here / "run.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items()), encoding="utf-8")
    return here


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ernie_tune", "train", str(folder / "run.yaml"), f"output_dir={folder / name}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "SEKRET", "HTTPS_PROXY": "http://me:SEKRET@proxy:1"}
    return subprocess.Popen(
        [*command, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def train(folder: Path, name: str, *words: str) -> Path:
    child = start(folder, name, *words)
    try:
        said, _ = child.communicate(timeout=240)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 0, said[-3000:]
    written = [path for path in (folder / name).rglob("*") if path.is_file()]
    assert not [path for path in written if b"SEKRET" in path.read_bytes()], (
        "output_dir is uploaded, its log folder too"
    )
    return folder / name


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return train(folder, "alone")


def losses(run: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def weights(run: Path) -> dict[str, np.ndarray]:
    return {k: v for file in run.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(run: Path, other: Path) -> None:
    assert [s for s, _ in losses(run)] == [s for s, _ in losses(other)] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in losses(other)], atol=TOLERANCE, rtol=0)
    mine, theirs = weights(run), weights(other)
    assert set(mine) == set(theirs)
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], atol=TOLERANCE, rtol=0, err_msg=name)
    results = [json.loads((r / "eval_results.json").read_text(encoding="utf-8")) for r in (run, other)]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=TOLERANCE)
    left = {p.name for p in run.iterdir()} - {"log"}
    assert left == {p.name for p in other.iterdir()} - {"log"}


@pytest.mark.parametrize("name", ["TP2+SP EP2", "EP2 sharding 2", "sharding 3", "TP2 PP2 SP"])
def test_a_run_under_a_layout_is_the_run_on_one_process(name: str, folder: Path, alone: Path) -> None:
    assert_same(train(folder, name.replace(" ", "_"), *LAYOUTS[name]), alone)


def test_adapters_under_a_pipeline_are_those_of_one_process(folder: Path) -> None:
    run = train(folder, "lora_pp", *LORA, *LAYOUTS["PP2"], "pp_seg_method=[1, 2]")
    assert_same(run, train(folder, "lora_alone", *LORA))
    said = "".join(log.read_text(encoding="utf-8") for log in (run / "log").rglob("workerlog.0"))
    assert "stages begin at [0, 2] of 6 items" in said


def half(folder: Path, source: Path, name: str) -> None:
    """A folder as `source` was after its third step."""
    run = folder / name
    run.mkdir()
    shutil.copytree(source / "checkpoint-3", run / "checkpoint-3")
    for file in ("trainer_log.jsonl", "before.json"):
        shutil.copy(source / file, run / file)


def pairs() -> list[tuple[str, str]]:
    rng = random.Random(7)
    every = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
    chosen = [("TP2", "PP2"), ("EP2 sharding 2", "one process")]
    more = int(os.environ.get("ERNIE_TUNE_PAIRS", "2")) - len(chosen)
    return chosen + rng.sample([p for p in every if p not in chosen], max(0, more))


@pytest.mark.parametrize(("first", "second"), pairs())
def test_a_run_goes_on_under_another_layout(first: str, second: str, folder: Path, alone: Path) -> None:
    source = folder / f"first_{first.replace(' ', '_')}"
    if not source.exists():
        train(folder, source.name, *LAYOUTS[first])
    name = f"{source.name}_then_{second.replace(' ', '_')}"
    half(folder, source, name)
    assert_same(train(folder, name, *LAYOUTS[second]), alone)


def workers(launched: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks: the processes of the launcher's launcher."""
    found = subprocess.run(["pgrep", "-f", "launcher.py train"], capture_output=True, text=True, check=False).stdout
    wanted = []
    for pid in map(int, found.split()):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if b"PADDLE_TRAINER_ID" in environ and f"ERNIE_TUNE_TEST={launched.args[-1]}".encode() in environ:  # type: ignore[index]
            wanted.append(pid)
    return wanted


@pytest.fixture(scope="module")
def steady(folder: Path) -> Path:
    """A run of two ranks that nothing happens to."""
    return train(folder, "steady", *LAYOUTS["TP2"], "save_steps=1")


@pytest.mark.parametrize("seed", range(int(os.environ.get("ERNIE_TUNE_KILLS", "1"))))
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(
    seed: int, folder: Path, steady: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, rng = f"killed_{seed}", random.Random(seed)
    mark = f"logging_dir={folder / name / 'runs'}"
    words = [*LAYOUTS["TP2"], "save_steps=1", mark]
    monkeypatch.setenv("ERNIE_TUNE_TEST", mark)
    child = start(folder, name, *words)
    log = folder / name / "trainer_log.jsonl"
    last = time.monotonic() + 120
    while not (log.is_file() and '"step": 1' in log.read_text(encoding="utf-8")):
        assert child.poll() is None, child.communicate()[0][-2000:]
        assert time.monotonic() < last, "the run does not start"
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.5))
    victims = workers(child)
    assert len(victims) == 2
    os.kill(rng.choice(victims), signal.SIGKILL)
    began = time.monotonic()
    child.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert not workers(child), "no rank is left"
    again = train(folder, name, *words)
    assert losses(again) == losses(steady)
    mine, theirs = weights(again), weights(steady)
    assert all(np.array_equal(value, theirs[key]) for key, value in mine.items()), "to the last bit"
    assert not list(again.glob("*.tmp"))


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        (
            {"tensor_model_parallel_size": 2},
            3,
            r"sharding_parallel_size \(2\) must divide the number of processes \(3\)",
        ),
        (
            {"sharding": "stage1 offload", "sharding_parallel_size": 2},
            2,
            r"sharding \(stage1 offload\) must be without",
        ),
    ],
)
def test_degrees_that_cannot_be_are_refused(settings: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of_run(build(settings).parallel, world)


def test_a_rank_goes_on_when_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it joins Paddle's store, in which rank 0 could name nobody who is missing."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = {"PADDLE_TRAINER_ENDPOINTS": f"127.0.0.1:{port}", "PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ID": "0"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(place.atexit, "register", lambda _: None)
    came: list[Watch] = []
    first = threading.Thread(target=lambda: came.append(place._watch(2)))  # type: ignore[arg-type]
    first.start()
    first.join(0.5)
    assert first.is_alive()
    other = Watch(1, 2, ("127.0.0.1", port), place.LIMITS)
    first.join(10)
    assert not first.is_alive()
    assert came[0].where == "waiting for the other ranks to start"
    for watch in (other, came[0]):
        watch.close()


def test_another_number_of_data_ranks_takes_up_what_all_had_to_read(tmp_path: Path) -> None:
    for file, position, waiting in (("data_state.json", 6, [4]), ("1_data_state.json", 10, [6, 8])):
        state = {"shard": {"position": position, "seed": 3}, "waiting": waiting, "dropped": {"too long": 2}}
        (tmp_path / file).write_text(json.dumps(state), encoding="utf-8")

    def state_of(rank: int, size: int) -> dict[str, Any]:
        place: Any = SimpleNamespace(batch=(rank, size))
        return StreamPart(place, SimpleNamespace()).state_in(tmp_path)  # type: ignore[arg-type]

    assert state_of(1, 2)["waiting"] == [6, 8]
    shard = {"position": 10, "seed": 3}  # rows 4, 7, 9 waited; rank 0 had not read 6 and 8 yet
    assert state_of(0, 1) == {"shard": shard, "waiting": [4, 7, 9], "unread": [6, 8], "dropped": {"too long": 4}}
    assert state_of(2, 3) == {"shard": shard, "waiting": [7], "unread": [], "dropped": {}}  # row 9

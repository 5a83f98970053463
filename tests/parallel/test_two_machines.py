"""Two launchers, as two machines would start them, on one host over loopback: they train together,
a killed rank of one ends the other, and the same two commands go on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.tiny_runs import text_row, write_rows

ROOT = Path(__file__).parents[2]
COMMON = {
    "model_name_or_path": "tiny-a",
    "fine_tuning": "LoRA",
    "per_device_train_batch_size": 1,
    "max_seq_len": 256,
    "learning_rate": 1e-3,
    "save_steps": 1,
    "plot_loss": False,
    "disable_tqdm": True,
}
RUNS = {
    "SFT": {"stage": "SFT", "max_steps": 4},
    "RLVR": {
        "stage": "RLVR",
        "max_steps": 50,
        "reward_funcs": "shade.py:even",
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
    },
}


SHADE = """
def even(completion_ids, **_):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""


@contextmanager
def machines(folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    base = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "NNODES", "RANK", "MASTER_"))}
    base |= {"PYTHONPATH": str(ROOT), "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base["ERNIE_TUNE_TEST"] = str(folder)
    command = [sys.executable, "-m", "ernie_tune", "train", str(folder / "run.yaml"), "--nproc", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [
        subprocess.Popen(command, env={**base, "RANK": str(rank)}, cwd=folder, start_new_session=True, **pipes)  # type: ignore[call-overload]
        for rank in range(2)
    ]
    try:
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for pid in ranks(folder):
            os.kill(pid, signal.SIGKILL)


def ranks(folder: Path) -> dict[int, int]:
    """Process id -> rank of what the launchers of this folder have started."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environ = dict(v.split(b"=", 1) for v in (place / "environ").read_bytes().split(b"\0") if b"=" in v)
            ours = environ.get(b"ERNIE_TUNE_TEST") == str(folder).encode() and b"PADDLE_TRAINER_ID" in environ
            if ours and b"launcher.py" in (place / "cmdline").read_bytes():
                found[int(place.name)] = int(environ[b"PADDLE_TRAINER_ID"])
        except OSError:
            continue
    return found


def steps(folder: Path) -> list[int]:
    log = folder / "out" / "trainer_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [record["step"] for record in map(json.loads, lines) if "loss" in record]


def made(folder: Path, stage: str) -> None:
    rows = [text_row(i) for i in range(16)]
    if stage == "RLVR":  # prompts, and a reward that fresh weights get in all shades
        rows = [{"messages": row["messages"][:1]} for row in rows]
        (folder / "shade.py").write_text(SHADE, encoding="utf-8")
    settings = {**COMMON, **RUNS[stage], "train_dataset_path": write_rows(folder / "train.jsonl", rows)}
    settings["output_dir"] = "out"
    (folder / "run.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items()), encoding="utf-8")


def begin_and_lose_a_rank(folder: Path) -> None:
    """Both machines make a step; then the rank of machine 1 is killed, and all must end."""
    last = time.monotonic() + 240
    with machines(folder) as children:
        while not steps(folder):
            assert all(child.poll() is None for child in children), children[0].communicate()[0][-3000:]
            assert time.monotonic() < last, "the run does not start"
            time.sleep(0.02)
        os.kill(next(pid for pid, rank in ranks(folder).items() if rank == 1), signal.SIGKILL)
        said = [child.communicate(timeout=120)[0] for child in children]
        assert all(child.returncode != 0 for child in children)
        assert not ranks(folder), "no rank is left on either machine"
    assert "rank 1" in said[0], "machine 0 says whom it has lost"


def test_sft_ends_on_both_and_the_same_commands_go_on(tmp_path: Path) -> None:
    made(tmp_path, "SFT")
    begin_and_lose_a_rank(tmp_path)
    with machines(tmp_path) as children:
        for child in children:
            text, _ = child.communicate(timeout=240)
            assert child.returncode == 0, text[-3000:]
    assert steps(tmp_path) == [1, 2, 3, 4]
    logs = tmp_path / "out" / "log"
    assert "layout: 2 process(es), data 2" in (logs / "workerlog.0").read_text(encoding="utf-8")
    assert (logs / "machine_1" / "workerlog.0").is_file(), "one log does not write over the other"


def test_learning_from_sampled_answers_ends_on_both(tmp_path: Path) -> None:
    made(tmp_path, "RLVR")
    begin_and_lose_a_rank(tmp_path)
    answers = (tmp_path / "out" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) >= 4, "both machines sampled"

"""cli/workers.py: what is started where, and what becomes of signals, logs and exit codes;
`doctor --dist` with real ranks, and without one.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ernie_tune.cli import workers
from ernie_tune.cli.verbs import UsageError
from ernie_tune.cli.workers import Start, wanted
from ernie_tune.config.arguments import ParallelArguments
from ernie_tune.parallel.watch import EXIT_LOST, Limits

ROOT = Path(__file__).parents[2]
SEVERAL = {"NNODES": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "777"}


@pytest.mark.parametrize(
    ("degrees", "nproc", "cards", "environ", "found"),
    [
        ({}, None, (), {}, None),
        ({}, 1, (), {}, None),
        ({}, 3, (), {}, Start(3)),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, None, (), {}, Start(4)),
        ({"sharding_parallel_size": 2}, 4, (), {}, Start(4)),
        # a worker already
        ({"tensor_model_parallel_size": 2}, None, (), {"PADDLE_TRAINER_ID": "0"}, None),
        ({}, None, ("3", "5"), {}, Start(2, ("3", "5"))),
        ({}, 1, ("3", "5"), {}, None),
        ({"tensor_model_parallel_size": 4}, None, (), SEVERAL, Start(2, (), 2, 1, "10.0.0.1:777")),
        ({}, None, ("0",), SEVERAL, Start(1, ("0",), 2, 1, "10.0.0.1:777")),
    ],
)
def test_what_is_started(
    degrees: dict[str, int], nproc: int | None, cards: Sequence[str], environ: dict[str, str], found: Start | None
) -> None:
    assert wanted(ParallelArguments(**degrees), nproc, cards, environ) == found


@pytest.mark.parametrize(
    ("nproc", "cards", "environ", "message"),
    [
        (3, ("0", "1"), {}, r"--nproc \(3\) must not exceed the visible cards \(2\)"),
        (2, (), {"NNODES": "two"}, r"NNODES \(two\) must be a number"),
        (2, (), {"NNODES": "2", "RANK": "0"}, r"NNODES \(2\) must go with MASTER_ADDR and MASTER_PORT"),
        (2, (), {**SEVERAL, "RANK": "2"}, r"RANK \(2\) must be below NNODES \(2\)"),
    ],
)
def test_what_cannot_be_started(nproc: int, cards: Sequence[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wanted(ParallelArguments(), nproc, cards, environ)


def test_the_number_of_processes_is_taken_out_of_the_words() -> None:
    assert workers.split_nproc(["run.yaml", "--nproc", "2", "seed=1"]) == (["run.yaml", "seed=1"], 2)
    assert workers.split_nproc(["run.yaml"]) == (["run.yaml"], None)
    for words in (["--nproc"], ["--nproc", "0"], ["--nproc", "-1"], ["--nproc", "many"]):
        with pytest.raises(UsageError, match="must be a number of processes, at least 1"):
            workers.split_nproc(words)


def test_the_launchers_command_line(tmp_path: Path) -> None:
    here = Start(2).command(tmp_path, ["train", "run.yaml"])
    assert here[-5:] == ["--nproc_per_node", "2", str(ROOT / "ernie_tune" / "launcher.py"), "train", "run.yaml"]
    assert here[here.index("--log_dir") + 1] == str(tmp_path)
    far = Start(2, ("3", "5"), 2, 1, "10.0.0.1:777").command(tmp_path, ["train"])
    at = far.index("--gpus")
    assert far[at:-2] == ["--gpus", "3,5", "--nnodes", "2", "--rank", "1", "--master", "10.0.0.1:777"]
    assert Start(2, ("3", "5"), 2, 1, "x:1").describe() == "starting 2 process(es) on cards 3,5, machine 1 of 2"
    assert Start(2).describe() == "starting 2 process(es) on the CPU"


def test_what_the_launcher_inherits() -> None:
    """What this process has set for itself stays here; what the user has set is handed on, secrets
    aside. No processor is asked.
    """
    ours = {"MKL_DEBUG_CPU_TYPE": "5", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    asked = {"ERNIE_TUNE_STARTED_BY": str(os.getpid())}
    given = {**SEVERAL, **ours, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "/a", "HOME": "/h"}
    assert workers.worker_environ(given, ours) == {"PYTHONPATH": f"{ROOT}{os.pathsep}/a", "HOME": "/h", **asked}
    theirs = dict.fromkeys(ours, "7")
    kept = workers.worker_environ({**theirs, "CUDA_VISIBLE_DEVICES": "1", "HF_TOKEN": "SEKRET"}, ours)
    assert kept == {**theirs, "CUDA_VISIBLE_DEVICES": "1", "PYTHONPATH": str(ROOT), **asked}, "set by the user"
    assert workers.worker_environ({**theirs, **ours}, {})["MKL_DEBUG_CPU_TYPE"] == "5", "where nothing was set for us"
    assert not set(dict(workers.CPU_PLAN.settings)) & set(workers.worker_environ(dict(workers.CPU_PLAN.settings)))


def test_cards_are_counted_where_the_build_can_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.visible_cards({"CUDA_VISIBLE_DEVICES": "0,1"}, gpu_build=False) == []
    assert workers.visible_cards({"CUDA_VISIBLE_DEVICES": "4, 6,"}, gpu_build=True) == ["4", "6"]
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert workers.visible_cards({}, gpu_build=True) == []
    tool.write_text("#!/bin/sh\necho 'GPU 0: x'\necho '  MIG 1'\necho 'GPU 1: x'\n")
    tool.chmod(0o755)
    assert workers.visible_cards({}, gpu_build=True) == ["0", "1"]


def test_logs_go_beside_the_run_unless_a_variable_says_where() -> None:
    assert workers.log_folder({}, "output/a") == Path("output/a/log")
    assert workers.log_folder({"ERNIEKIT_DIST_LOG": "logs"}, "output/a") == Path("logs")


# A launcher with one worker. The worker saves when it is interrupted, unless it is told to be deaf;
# the launcher itself dies of either signal.
LAUNCHER = """
import signal, subprocess, sys
worker = '''
import signal, sys, time
deaf = sys.argv[1] == "deaf"
def save(*_):
    if not deaf:
        open(sys.argv[2], "w").write("saved")
        sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(20)
'''
child = subprocess.Popen([sys.executable, "-c", worker, sys.argv[1], sys.argv[2] + "/saved"], stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[2] + "/workerlog.0", "a").write("new\\n")
def end(*_):
    child.kill()
    sys.exit(15)
signal.signal(signal.SIGTERM, end)
sys.exit(child.wait())
"""


class Fake(Start):
    """Starts the launcher above."""

    def command(self, log_dir: Path, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", LAUNCHER, words[0], str(log_dir)]


def signalled(log_dir: Path, kind: str, times: int) -> int:
    """`start` with so many interrupts, from the moment the worker is ready."""

    def interrupt() -> None:
        while not (log_dir / "workerlog.0").exists():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        return workers.start(Fake(1), log_dir, [kind])
    finally:
        thread.join()


def test_an_interrupt_reaches_the_workers_and_the_second_one_ends_them(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    (tmp_path / "workerlog.0.old").write_text("older\n")
    assert signalled(tmp_path, "kind", 1) == 130
    assert (tmp_path / "saved").read_text() == "saved"
    deaf = tmp_path / "deaf"
    deaf.mkdir()
    start = time.monotonic()
    assert signalled(deaf, "deaf", 2) == 130
    assert time.monotonic() - start < 10
    assert not (deaf / "saved").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


class Ending(Start):
    def command(self, log_dir: Path, words: Sequence[str]) -> list[str]:
        text = f"import pathlib; pathlib.Path({str(log_dir)!r}, 'workerlog.0').write_text('new')" if words else ""
        return [sys.executable, "-c", f"{text}\nraise SystemExit(7)"]


def test_an_earlier_runs_lines_are_kept_aside_and_a_bad_end_says_where_to_look(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert workers.start(Ending(2), tmp_path / "none", []) == 7
    assert f"exit code 7; no process has written to {tmp_path}/none" in capfd.readouterr().err
    (tmp_path / "workerlog.0").write_text("earlier")
    assert workers.start(Ending(2), tmp_path, ["x"]) == 7
    assert [(tmp_path / name).read_text() for name in ("workerlog.0", "workerlog.0.old")] == ["new", "earlier"]
    said = capfd.readouterr().err
    assert f"starting 2 process(es) on the CPU; every process writes {tmp_path}/workerlog.N" in said
    assert f"ended with exit code 7; each process's lines are in {tmp_path} (workerlog.0, workerlog.0.old)" in said


def test_a_kill_for_lack_of_memory_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for after, told in ((5, False), (6, True)):
        counts = iter((5, after))
        monkeypatch.setattr(workers, "kills", lambda counts=counts: next(counts))
        assert workers.start(Ending(2), tmp_path, []) == 7
        said = capfd.readouterr().err
        assert ("because memory ran out; lower max_seq_len or per_device_train_batch_size" in said) == told


def test_machines_do_not_share_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert workers.start(Ending(1, nodes=2, node=1, master="10.0.0.1:7"), tmp_path, ["x"]) == 7
    assert (tmp_path / "machine_1" / "workerlog.0").read_text() == "new"
    assert f"every process writes {tmp_path}/machine_1/workerlog.N" in capfd.readouterr().err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_machines_meet_or_are_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    thread = threading.Thread(target=workers.meet, args=(Start(1, (), 2, 1, address), Limits(beat=0.1, join=20)))
    thread.start()
    workers.meet(Start(1, (), 2, 0, address), Limits(beat=0.1, join=20))
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(ConnectionError, match=r"machine 1, 2 of 3 did not start within 0\.5 s"):
        workers.meet(Start(1, (), 3, 0, f"127.0.0.1:{free_port()}"), Limits(beat=0.1, join=0.5))
    with pytest.raises(ConnectionError, match=r"machine 0 at 127\.0\.0\.1:\d+ did not answer machine 1 for 0\.3 s"):
        workers.meet(Start(1, (), 2, 1, f"127.0.0.1:{free_port()}"), Limits(join=0.3))


def test_doctor_measures_how_ranks_talk(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")}
    environ = {**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "ernie_tune", "doctor", "--dist", "--nproc", "3"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.glob("ernie-tune-doctor-*")), "logs are left only where something went wrong"
    name = re.escape(socket.gethostname())
    for line in (
        rf"^3 ranks: 0 on {name}, 1 on {name}, 2 on {name}$",
        r"^all-reduce, 4 bytes a rank: \d+\.\d\d ms$",
        r"^all-reduce, 16 MiB a rank: \d+\.\d\d ms$",
        r"^all-to-all, 4 bytes a rank: \d+\.\d\d ms$",
        r"^all-to-all, 16 MiB a rank: \d+\.\d\d ms$",
    ):
        assert re.search(line, done.stdout, re.MULTILINE), (line, done.stdout)
    rows = re.findall(r"^  rank (\d): (.*)$", done.stdout, re.MULTILINE)
    assert [int(rank) for rank, _ in rows] == [0, 1, 2]
    for i, (_, cells) in enumerate(rows):
        values = cells.split()
        assert values[i] == "-"
        assert all(float(v) > 0 for j, v in enumerate(values) if j != i), "GB/s of every pair"


# A rank of the probe; "wrong": its sums are off by one a rank, as with two versions of a library.
RANK = """
import sys
from ernie_tune.parallel import gloo, probe
from ernie_tune.parallel.watch import Limits
if sys.argv[1] == "wrong":
    add = gloo._REDUCE[gloo.core.ReduceOp.SUM]
    gloo._REDUCE[gloo.core.ReduceOp.SUM] = lambda a, b, out: add(a, b + 1, out=out)
probe.probe(print, Limits(beat=0.2, join=2, silent=5, idle=10, grace=1))
"""


def test_doctor_names_a_rank_that_never_comes() -> None:
    ports = ",".join(f"127.0.0.1:{free_port()}" for _ in range(3))
    shared = {"PYTHONPATH": str(ROOT), "PADDLE_TRAINERS_NUM": "3", "PADDLE_TRAINER_ENDPOINTS": ports}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, "right"],
            env={**os.environ, **shared, "PADDLE_TRAINER_ID": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 2)
    ]
    start = time.monotonic()
    try:
        for child in children:
            _, said = child.communicate(timeout=60)
            assert child.returncode == EXIT_LOST
            assert "rank 1 of 3 did not start within 2 s; the run ends on all ranks" in said
            assert "waiting for the other ranks to start" in said
    finally:
        for child in children:
            child.kill()
    assert time.monotonic() - start < 45, "starting Python, two seconds, and no more"


def test_doctor_tells_of_wrong_sums(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path)]
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")}, "PYTHONPATH": str(ROOT)}
    environ |= {"HF_TOKEN": "SEKRET-1", "HTTPS_PROXY": "http://me:SEKRET-2@proxy:1"}
    done = subprocess.run([*command, str(tmp_path / "rank.py"), "wrong"], env=environ, capture_output=True, timeout=90)
    assert done.returncode != 0
    logs = "".join(path.read_text() for path in tmp_path.glob("workerlog.*"))
    assert "RuntimeError: all-reduce gave 4 at 0, which must be 3" in logs
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    assert not [path for path in written if b"SEKRET" in path.read_bytes()], "the user started the launcher"

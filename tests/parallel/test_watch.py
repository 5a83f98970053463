"""parallel/watch.py with real processes: one dies, stops, sleeps, spins, fails or never comes, and
all end in time, saying who waited where.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.parallel import watch as watch_module
from ernie_tune.parallel.watch import EXIT_LOST, Limits, Watch, launched_address

ROOT = Path(__file__).parents[2]
# A rank: does as it is told at its third mark, the others go on marking, or wait at a barrier that
# never opens.
SCRIPT = """
import sys, threading, time
from ernie_tune.parallel.watch import Limits, Watch
rank, size, port, act = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
limits = Limits(beat=0.1, join=3, silent=1.5, idle=1.5, stuck=3, grace=0.5)
watch = Watch(rank, size, ("127.0.0.1", port), limits)
print("ready", flush=True)
def wait_for_others():
    threading.Event().wait()
def spin():
    while True: pass
for step in range(3):
    watch.mark(f"step {step}")
    time.sleep(0.2)
if act == "leave":
    watch.close()
elif act == "wait":
    wait_for_others()
elif act == "spin":
    spin()
elif act == "fail":
    watch.failed(ValueError("row 7 is bad"))
    watch.close()
    sys.exit(1)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ranks(acts: list[str], size: int | None = None) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each act. All have started, or have been given up, when the block begins."""
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(r), str(size or len(acts)), str(port), act],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for r, act in enumerate(acts)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def ends(children: list[subprocess.Popen[str]], but: int = -1) -> list[str]:
    """What the ranks said at their end, which comes within 10 s; all but one end because of
    another.
    """
    said = []
    for rank, child in enumerate(children):
        if rank != but:
            said.append(child.communicate(timeout=10)[1])
            assert child.returncode == EXIT_LOST, said[-1]
    return said


def test_a_killed_rank_ends_all_and_says_who_waited_where() -> None:
    with ranks(["wait", "wait", "wait"]) as children:
        time.sleep(0.7)
        children[1].send_signal(signal.SIGKILL)
        start = time.monotonic()
        for text in ends(children, but=1):
            assert f"rank 1 ({socket.gethostname()}, process {children[1].pid}) died, last seen at: step 2" in text
            assert "rank 0, step 2: " in text
            assert "rank 2, step 2: " in text
            assert "wait_for_others" in text, "the stack of a rank that waits"
            assert "Current thread" in text, "and all its threads"
        assert time.monotonic() - start < 6


def test_without_rank_0_everybody_ends() -> None:
    with ranks(["wait", "wait"]) as children:
        time.sleep(0.7)
        children[0].send_signal(signal.SIGKILL)
        assert "rank 0 is gone: its connection to rank 1 broke" in ends(children, but=0)[0]


def test_a_stopped_process_is_noticed_by_its_silence() -> None:
    with ranks(["spin", "spin"]) as children:
        time.sleep(0.5)
        children[1].send_signal(signal.SIGSTOP)
        assert "has not answered for 1.5 s, last seen at: step 2" in ends(children, but=1)[0]


def test_a_deadlock_is_noticed_though_all_are_alive() -> None:
    with ranks(["wait", "wait"]) as children:
        for text in ends(children):
            assert "no rank has computed anything for 1.5 s: they wait for each other" in text


def test_a_loop_without_end_is_noticed_by_its_marks() -> None:
    with ranks(["spin", "wait"]) as children:
        for text in ends(children):
            assert "no rank has made progress for 3 s" in text
            assert "rank 0, step 2: " in text
            assert " spin" in text


def test_the_error_of_one_rank_is_told_to_all() -> None:
    with ranks(["wait", "fail"]) as children:
        assert "failed: ValueError: row 7 is bad" in ends(children, but=1)[0]
        assert children[1].wait(10) == 1
    with ranks(["fail", "wait"]) as children:
        assert "failed: ValueError: row 7 is bad" in ends(children, but=0)[0]
        assert children[0].wait(10) == 1


def test_ranks_that_never_come_are_named() -> None:
    with ranks(["wait", "wait"], size=4) as children:
        for text in ends(children):
            assert "rank 2, 3 of 4 did not start within 3 s" in text


def test_a_run_that_ends_well_is_left_alone() -> None:
    with ranks(["leave", "leave", "leave"]) as children:
        assert [child.wait(10) for child in children] == [0, 0, 0]


def test_no_thread_is_left() -> None:
    """One that wakes up while the interpreter ends crashes it."""
    before, address, limits = threading.enumerate(), ("127.0.0.1", free_port()), Limits(beat=30)
    ranks = [Watch(rank, 2, address, limits) for rank in (0, 1)]
    assert all(watch.all_here.wait(10) for watch in ranks)
    start = time.monotonic()
    ranks[1].close()
    ranks[0].limits = Limits(silent=0.1, grace=0.1)  # its judge looks once a second
    ranks[0].close()
    assert not [t.name for t in threading.enumerate() if t not in before]
    assert time.monotonic() - start < 5


def test_rank_0_is_the_last_to_hear_that_all_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """It then joins Paddle's store, which holds its interpreter until all have joined: whoever had
    not been told by then would wait for ever.
    """
    ranks: list[Watch] = []
    others_heard: list[bool] = []

    def tell(member: Any, **message: Any) -> None:
        if member is ranks[0]._hub.members[0]:  # type: ignore[union-attr]
            while len(ranks) < 4:
                time.sleep(0.01)
            others_heard.append(all(watch.all_here.wait(1) for watch in ranks[1:]))
        real(member, **message)

    real, address, limits = watch_module._tell, ("127.0.0.1", free_port()), Limits(beat=0.1)
    monkeypatch.setattr(watch_module, "_tell", tell)
    for rank in range(4):
        ranks.append(Watch(rank, 4, address, limits))
    assert ranks[0].all_here.wait(10)
    assert others_heard
    assert all(others_heard)
    for watch in reversed(ranks):
        watch.close()


def test_a_rank_without_rank_0_gives_up() -> None:
    with pytest.raises(ConnectionError, match=r"rank 0 at 127.0.0.1:\d+ did not answer rank 1 for 0.3 s"):
        Watch(1, 2, ("127.0.0.1", free_port()), Limits(join=0.3))


def test_the_address_is_the_launchers() -> None:
    launched = {"PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:6070,10.0.0.1:6071", "PADDLE_TRAINERS_NUM": "2"}
    assert launched_address(launched) == ("10.0.0.1", 6070)
    assert launched_address({}) is None
    assert launched_address({**launched, "PADDLE_TRAINERS_NUM": "1"}) is None

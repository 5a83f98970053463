"""ui/jobs.py, ui/child.py, ui/asking.py: child processes that go on or end with the studio, and
models behind them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import IMAGES

from ernie_tune.ui import asking
from ernie_tune.ui.jobs import DONE, FAILED, RUNNING, STOPPED, ChildJob, Jobs, born


def started(jobs: Jobs, *words: str, **environ: str) -> Any:
    return jobs.start("train", "a run", words, jobs.folder, environ)


def test_a_job_goes_on_without_the_studio_that_started_it(tmp_path: Path) -> None:
    job = started(Jobs(tmp_path), "version", SECRET="hidden")
    later = Jobs(tmp_path)  # another studio, which is nobody's parent
    assert later.get(job.id) == job
    assert later.wait(job, 60) == DONE
    assert later.exit_code(job) == 0
    assert "ernie-tune 0." in later.output(job)
    assert "hidden" not in "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file()), (
        "the environment is not kept"
    )
    failed = started(later, "nonsense")
    assert (later.wait(failed, 60), later.exit_code(failed)) == (FAILED, 2)
    assert [one.id for one in Jobs(tmp_path).all()] == [failed.id, job.id]
    with pytest.raises(ValueError, match=r"job \(x\) must be one of this studio"):
        later.get("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "job.json").write_text("{")
    assert len(later.all()) == 2


def test_a_job_is_asked_to_stop(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = started(jobs, "chat", "nowhere")  # a child that would wait
    place = tmp_path / job.id
    jobs.wait(job, 60)
    sleeper = subprocess.Popen(
        [sys.executable, "-m", "ernie_tune.ui.child", str(place / "code"), "-", sys.executable, "-c",
         "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *a: sys.exit(7))\nprint('up', flush=True)\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert sleeper.stdout is not None
    sleeper.stdout.readline()
    known = json.loads((place / "job.json").read_text())
    (place / "job.json").write_text(json.dumps({**known, "pid": sleeper.pid, "born": born(sleeper.pid)}))
    (place / "exit_code").unlink()
    job = jobs.get(job.id)
    assert Jobs(tmp_path).state(job) == RUNNING
    Jobs(tmp_path).stop(job)
    assert sleeper.wait(30) == 7, "the child ended as it wished, and its code was handed on"
    assert (place / "code").read_text() == "7\n"
    assert Jobs(tmp_path).state(job) == STOPPED


_STUDIO = """
import sys, time
from pathlib import Path
from ernie_tune.ui.jobs import Jobs

class Waiting(Jobs):
    command = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)")

for tied in (True, False):
    print(Waiting(Path(sys.argv[1])).start("ask", "a", [], Path(), tied=tied).pid, flush=True)
time.sleep(600)
"""


def test_servers_end_with_a_studio_that_is_killed_and_runs_go_on(tmp_path: Path) -> None:
    studio = subprocess.Popen([sys.executable, "-c", _STUDIO, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert studio.stdout is not None
    tied, free = int(studio.stdout.readline()), int(studio.stdout.readline())
    until(lambda: all("up" in log.read_text() for log in tmp_path.glob("*/output.log")) and children(tied) != [])
    below = children(tied) + children(free)
    assert len(below) == 2, "each has its command"
    studio.kill()
    studio.wait()
    try:
        until(lambda: not born(below[0]) and not born(tied))
        assert born(free)
        assert born(below[1])
    finally:
        os.kill(free, signal.SIGTERM)
    until(lambda: not born(below[1]))


def test_a_command_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    holder = subprocess.Popen(
        [sys.executable, "-m", "ernie_tune.ui.child", str(tmp_path / "code"), str(read), sys.executable, "-c",
         "import time; print('up', flush=True); time.sleep(600)"],
        stdout=subprocess.PIPE, pass_fds=[read],
    )  # fmt: skip
    os.close(read)
    assert holder.stdout is not None
    holder.stdout.readline()
    (command,) = children(holder.pid)
    holder.kill()
    holder.wait()
    until(lambda: not born(command))
    os.close(write)


def children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(number) for number in file.read_text().split()] if file.exists() else []


def until(look: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end, "never"
        time.sleep(0.02)


def test_a_number_that_another_process_got_is_not_the_job(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = started(jobs, "version")
    jobs.wait(job, 60)
    (tmp_path / job.id / "exit_code").unlink()  # the machine was switched off
    file = tmp_path / job.id / "job.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pid": os.getpid(), "born": 12345}))
    later = Jobs(tmp_path)
    again = later.get(job.id)
    assert later.state(again) == FAILED
    later.stop(again)  # must not reach this process
    later.kill(again)
    assert born(os.getpid()) > 0
    assert born(2**22 + 1) == 0


# --- models that answer ---------------------------------------------------------------------------


def test_the_body_of_a_question_with_pictures(tmp_path: Path) -> None:
    body = asking.asked_body([{"role": "user", "content": "<image>what"}], [str(IMAGES / "0003.png")], n=2)
    picture, words = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert words == {"type": "text", "text": "what"}
    assert body["n"] == 2
    assert asking.asked_body([{"role": "user", "content": r"the \<image> tag"}], [])["messages"][0]["content"]
    for content, images in (("<image>", []), ("none", ["a.png"])):
        with pytest.raises(ValueError, match="must be as many as pictures"):
            asking.asked_body([{"role": "user", "content": content}], images)


def test_a_model_that_does_not_come_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Jobs.start
    monkeypatch.setattr(
        Jobs, "start", lambda self, k, t, words, *more, **rest: start(self, k, t, ["nonsense", *words], *more, **rest)
    )
    servers = asking.ModelServers(Jobs(tmp_path / "jobs"), tmp_path)
    with pytest.raises(ValueError, match=r"must come up, but says: .*unknown verb"), servers.asked("nothing"):
        pass
    server = servers.running["nothing"]
    assert server.asking == 0
    assert server.key not in (tmp_path / "jobs" / server.job.id / "job.json").read_text()
    servers.close()


class Still(Jobs):
    """Jobs that start nothing and run until they are ended."""

    def start(self, kind: str, title: str, *more: Any, **rest: Any) -> ChildJob:  # type: ignore[override]
        self.ended: list[str] = getattr(self, "ended", [])
        return ChildJob(title, kind, title, (), 0, 0, 0.0)

    def state(self, job: ChildJob) -> str:
        return STOPPED if job.title in self.ended else RUNNING

    def kill(self, job: ChildJob) -> None:
        self.ended.append(job.title)


def test_a_model_that_is_asked_is_not_ended_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Still(tmp_path / "jobs")
    servers = asking.ModelServers(jobs, tmp_path)
    monkeypatch.setattr(servers, "wait", lambda server: None)
    with servers.asked("a") as first, servers.asked("b"):
        with servers.asked("a") as again:
            assert again is first, "two tabs, one server"
        with pytest.raises(ValueError, match=r"models that answer \(2\) must be fewer than 3"), servers.asked("c"):
            pass
        assert jobs.ended == []
    with servers.asked("c"):
        assert jobs.ended == ["b"], "the one that was asked least recently"

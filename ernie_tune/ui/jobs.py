"""Training, exporting and serving as child processes that go on when the page, or the studio, is
closed.

A job is a folder with what was started, its output and its exit code; a process counts as the
job's own only where its number and its time of birth agree. Refuses to know: pages, what commands
mean.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.language import say
from ernie_tune.ui.child import NO_LEASH

RUNNING, DONE, FAILED, STOPPED = "running", "done", "failed", "stopped"
_JOB, _LOG, _CODE, _ASKED = "job.json", "output.log", "exit_code", "stop_asked"
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class ChildJob:
    """One started command. `born`: clock ticks since the machine's start at which its process
    began; with `pid` it names the process.
    """

    id: str
    kind: str
    title: str
    argv: tuple[str, ...]
    pid: int
    born: int
    started: float


class Jobs:
    """The jobs of one folder, old ones too. `command`: what the words of a job are given to."""

    command: tuple[str, ...] = (sys.executable, "-m", "ernie_tune")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._pipe: tuple[int, int] | None = None

    def start(
        self,
        kind: str,
        title: str,
        words: Sequence[str],
        cwd: Path,
        environ: Mapping[str, str] | None = None,
        tied: bool = False,
    ) -> ChildJob:
        """`python -m ernie_tune words…` in a session of its own, in `cwd`. `environ` is added to
        the environment and written nowhere. `tied`: it ends when this process does, even a killed
        one; otherwise it goes on.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{os.urandom(3).hex()}"
        place = self.folder / name
        place.mkdir()
        command = [*self.command, *words]
        leash = [self._leash()] if tied else []
        holder = [sys.executable, "-m", "ernie_tune.ui.child", str(place / _CODE)]
        with (place / _LOG).open("wb") as log:
            child = subprocess.Popen(
                [*holder, str(leash[0]) if leash else NO_LEASH, *command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=leash,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})},
            )
        self._children[name] = child
        job = ChildJob(name, kind, title, tuple(words), child.pid, born(child.pid), time.time())
        write_atomically(place / _JOB, json.dumps(asdict(job), ensure_ascii=False))
        return job

    def _leash(self) -> int:
        """The reading end of the pipe that closes when this process ends. The writing end is passed
        to nobody and lives as long as the process.
        """
        if self._pipe is None:
            self._pipe = os.pipe()
        return self._pipe[0]

    def all(self) -> list[ChildJob]:
        """Every job, the newest first. Folders that hold none are left alone."""
        found = []
        for file in self.folder.glob(f"*/{_JOB}"):
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
                found.append(ChildJob(**{**known, "argv": tuple(known["argv"])}))
            except (ValueError, TypeError, KeyError):
                continue
        return sorted(found, key=lambda job: job.started, reverse=True)

    def get(self, name: str) -> ChildJob:
        """Raises ValueError for a name that no job has."""
        for job in self.all():
            if job.id == name:
                return job
        raise ValueError(say(f"job ({name}) must be one of this studio; choose one", f"任务（{name}）不存在；请选择"))

    def state(self, job: ChildJob) -> str:
        """RUNNING, DONE, FAILED or STOPPED (because somebody asked)."""
        child = self._children.get(job.id)
        if child is not None:
            child.poll()  # so that a dead child is no zombie
        code = self.exit_code(job)
        if code is None and job.born and born(job.pid) == job.born:
            return RUNNING
        if (self.folder / job.id / _ASKED).exists():
            return STOPPED
        return DONE if code == 0 else FAILED

    def exit_code(self, job: ChildJob) -> int | None:
        """None while it runs, and where its end was not seen (a machine that was switched off)."""
        file = self.folder / job.id / _CODE
        return int(file.read_text(encoding="utf-8")) if file.is_file() else None

    def stop(self, job: ChildJob) -> None:
        """Ask it to end as Ctrl-C does: training finishes its step and saves; asked a second time
        it ends at once. Fine for one that has ended."""
        if self.state(job) != RUNNING:
            return
        (self.folder / job.id / _ASKED).touch()
        os.kill(job.pid, signal.SIGINT)

    def kill(self, job: ChildJob) -> None:
        """End it now, with all that it has started: for servers, which have nothing to save."""
        if self.state(job) != RUNNING:
            return
        (self.folder / job.id / _ASKED).touch()
        os.kill(job.pid, signal.SIGTERM)

    def wait(self, job: ChildJob, seconds: float) -> str:
        """The state once it has ended, or after so many seconds."""
        end = time.monotonic() + seconds
        while self.state(job) == RUNNING and time.monotonic() < end:
            time.sleep(0.05)
        return self.state(job)

    def output(self, job: ChildJob) -> str:
        """The end of what it has printed."""
        with (self.folder / job.id / _LOG).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
        return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n"))


def born(pid: int) -> int:
    """When a process began, in clock ticks since the machine's start; 0 for none and for a dead
    one that waits to be collected. Where there is no /proc, 1 while it lives.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return 0
        try:
            os.kill(pid, 0)
        except OSError:
            return 0
        return 1
    return 0 if fields[0] == "Z" else int(fields[19])

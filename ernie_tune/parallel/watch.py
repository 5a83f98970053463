"""Nobody waits for ever: a rank that died, hangs or does not answer ends the run on all ranks
within a bounded time, with a line of who waited where.

Every rank holds a connection to rank 0 and sends a beat over it: what it does, and whether its main
thread computes. A killed process is noticed by its connection, a stopped one by its silence, a
deadlock by all main threads standing still. Rank 0 then asks all for their stacks and tells them to
end; a rank whose connection to rank 0 breaks ends by itself. Plain sockets and JSON, beside
whatever the training itself uses.
Refuses to know: paddle, what is computed, how ranks exchange tensors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ernie_tune.config.language import say

EXIT_LOST = 75  # of a rank that ends because of another
_TELLING = 4.0  # seconds for asking all for their stacks and telling them to end
_FRAMES = 4  # innermost frames of a stack in the line of a rank


@dataclass(frozen=True)
class Limits:
    """Seconds. `idle`: no main thread has computed anything; None where that cannot be told.
    `stuck`: nobody has come to a new mark, though some compute.
    """

    beat: float = 2.0
    join: float = 60.0
    silent: float = 20.0
    idle: float | None = 40.0
    stuck: float = 1800.0
    grace: float = 5.0  # for ranks to end by themselves when one of them reports an error


class Watch:
    """One rank's end of it. `mark` where the main thread is; leave with `close`, or with `failed`
    first.

    `address`: where rank 0 listens, the same on every rank. `end(text)`: what happens to this rank
    when the run is over for all; by default stacks of all threads go to the error stream and the
    process exits with EXIT_LOST, whatever its main thread waits for. `what` is what messages call a
    rank.
    `all_here` is set once every rank has come. Raises ConnectionError when rank 0 does not.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: tuple[str, int],
        limits: Limits | None = None,
        end: Callable[[str], None] | None = None,
        what: str = "rank",
    ) -> None:
        self.rank, self.size, self.address, self.limits = rank, size, address, limits or Limits()
        self.where, self.marks, self.over = "starting", 0, False
        self._end = end or _end_process
        self._main = threading.main_thread()
        self.what, self.all_here = what, threading.Event()
        self._hub = _Hub(size, address, self.limits, what) if rank == 0 else None
        self._socket = self._connect()
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._send(hello=rank, place=f"{socket.gethostname()}, process {os.getpid()}")
        self._threads = [_started(work) for work in (self._beat, self._listen)]

    def _connect(self) -> socket.socket:
        """Rank 0 may come later than others."""
        last = time.monotonic() + self.limits.join
        while True:
            try:
                return socket.create_connection(self.address, timeout=None)
            except OSError as error:
                if time.monotonic() > last:
                    raise ConnectionError(
                        say(
                            f"{self.what} 0 at {self.address[0]}:{self.address[1]} did not answer {self.what} "
                            f"{self.rank} for {self.limits.join:g} s ({error}); "
                            "start it, or check the address and the firewall",
                            f"{self.address[0]}:{self.address[1]} 的 {self.what} 0 在 {self.limits.join:g} 秒内没有答复 "
                            f"{self.what} {self.rank}（{error}）；请启动它，或检查地址与防火墙",
                        )
                    ) from error
                time.sleep(0.2)

    def wait_for_all(self) -> None:
        """Until every rank has come. Paddle's store waits for them too, but so that rank 0 can name
        nobody: it holds the interpreter of its process.
        """
        self.mark("waiting for the other ranks to start")
        self.all_here.wait()

    def mark(self, where: str) -> None:
        """The main thread has come to `where`: progress."""
        self.where = where
        self.marks += 1

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error: the others are told why."""
        self._send(failed=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """This rank is done. Rank 0 waits until all others are, or have been told to end. No thread
        is left: one that woke up while the interpreter ends would crash it.
        """
        self.over = True
        self._left.set()
        self._send(bye=True)
        if self._hub is not None:
            self._hub.finished.wait(self.limits.silent + self.limits.grace + _TELLING)
            self._hub.close()
        _hang_up(self._socket)
        for thread in self._threads:
            thread.join(1.0)

    # --- threads ----------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self.over:
            self._send(where=self.where, marks=self.marks, work=_work(self._main))
            self._left.wait(self.limits.beat)

    def _listen(self) -> None:
        try:
            for message in _messages(self._socket):
                if "all_here" in message:
                    self.all_here.set()
                if "stack" in message:
                    self._send(stack=stack_line(self._main))
                if "end" in message and not self.over:
                    self._end(message["end"])
                    return
        except OSError:
            pass
        if not self.over:
            self._end(f"{self.what} 0 is gone: its connection to {self.what} {self.rank} broke; look at its log")

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError), self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def _end_process(text: str) -> NoReturn:
    print(f"ernie_tune: {text}\nernie_tune: this rank, all threads:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os._exit(EXIT_LOST)


def _started(work: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=args, name=f"watch {work.__name__}", daemon=True)
    thread.start()
    return thread


def _hang_up(connection: socket.socket) -> None:
    """What was sent still arrives; whoever waits at either end goes on."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _messages(connection: socket.socket) -> Iterator[Mapping[str, Any]]:
    with connection.makefile("r", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def stack_line(thread: threading.Thread) -> str:
    """The innermost frames of a thread, innermost last."""
    frame = sys._current_frames().get(thread.ident or 0)
    frames = traceback.extract_stack(frame)[-_FRAMES:] if frame else []
    return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames) or "no stack"


def _work(thread: threading.Thread) -> float | None:
    """What grows while a thread computes or waits for a disk: its seconds of CPU; None where the
    system does not tell.
    """
    try:
        text = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if fields[0] == "D":
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- rank 0's side --------------------------------------------------------------------------------


@dataclass
class _Member:
    """What rank 0 knows of one rank."""

    connection: socket.socket
    place: str
    seen: float
    moved: float  # when it last came to another mark
    worked: float  # when its main thread last computed
    marks: int = -1
    work: float | None = None
    where: str = ""
    stack: str = ""
    failed: str = ""
    left: bool = False
    broken: bool = False


@dataclass
class _Hub:
    """Listens to all ranks, judges once a beat, and says the end."""

    size: int
    address: tuple[str, int]
    limits: Limits
    what: str
    members: dict[int, _Member] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.server = socket.create_server(self.address)
        self.threads: list[threading.Thread] = []
        self.threads += [_started(work) for work in (self._accept, self._judge)]

    def close(self) -> None:
        """Once it is finished: let go of all members."""
        for connection in (self.server, *(m.connection for m in list(self.members.values()))):
            _hang_up(connection)
        for thread in self.threads:
            thread.join(1.0)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.threads.append(_started(self._serve, connection))

    def _serve(self, connection: socket.socket) -> None:
        member: _Member | None = None
        try:
            for message in _messages(connection):
                now = time.monotonic()
                if member is None:
                    if "hello" not in message:
                        return  # not one of ours
                    member = _Member(connection, str(message["place"]), now, now, now)
                    self.members[int(message["hello"])] = member
                    if len(self.members) == self.size:
                        # Rank 0, this process, last: next it may wait for the others in Paddle's
                        # store, and no thread of it runs meanwhile
                        for _, each in sorted(self.members.items(), reverse=True):
                            _tell(each, all_here=True)
                self._note(member, message, now)
        except (OSError, ValueError):
            pass
        if member is not None:
            member.broken = True

    def _note(self, member: _Member, message: Mapping[str, Any], now: float) -> None:
        member.seen = now
        if message.get("marks", member.marks) != member.marks:
            member.marks, member.moved = message["marks"], now
        if "work" in message:
            # Less than a hundredth of the time is what waiting costs.
            before = member.work
            if before is None or message["work"] is None or message["work"] - before > self.limits.beat / 100:
                member.worked = now
            member.work = message["work"]
        member.where = message.get("where", member.where)
        member.stack = message.get("stack", member.stack)
        member.failed = message.get("failed", member.failed)
        member.left = member.left or "bye" in message

    def _judge(self) -> None:
        while not self.finished.is_set():
            time.sleep(min(1.0, self.limits.beat))
            here = dict(self.members)
            if len(here) == self.size and all(m.left for m in here.values()):
                break
            verdict = self._verdict(here, time.monotonic())
            if verdict:
                self._say_the_end(verdict)
                break
        self.finished.set()
        _hang_up(self.server)
        self.server.close()

    def _verdict(self, here: Mapping[int, _Member], now: float) -> str:
        """What is wrong, or nothing."""
        limits, what = self.limits, self.what
        missing = [r for r in range(self.size) if r not in here]
        if missing:
            late = now - self.started > limits.join
            return f"{what} {_numbers(missing)} of {self.size} did not start within {limits.join:g} s" if late else ""
        for rank, m in here.items():
            if m.failed:
                time.sleep(limits.grace)
                return f"{what} {rank} ({m.place}) failed: {m.failed}"
        present = {rank: m for rank, m in here.items() if not m.left}
        for rank, m in present.items():
            if m.broken:
                return f"{what} {rank} ({m.place}) died, last seen at: {m.where}"
            if now - m.seen > limits.silent:
                return f"{what} {rank} ({m.place}) has not answered for {limits.silent:g} s, last seen at: {m.where}"
        if limits.idle is not None and all(now - max(m.worked, m.moved) > limits.idle for m in present.values()):
            return f"no rank has computed anything for {limits.idle:g} s: they wait for each other"
        if all(now - m.moved > limits.stuck for m in present.values()):
            return f"no rank has made progress for {limits.stuck:g} s"
        return ""

    def _say_the_end(self, verdict: str) -> None:
        present = {rank: m for rank, m in self.members.items() if not (m.left or m.broken or m.failed)}
        for m in present.values():
            _tell(m, stack=True)
        last = time.monotonic() + _TELLING - 1
        while time.monotonic() < last and not all(m.stack for m in present.values()):
            time.sleep(0.05)
        lines = [f"  rank {rank}, {m.where}: {m.stack or 'no answer'}" for rank, m in sorted(present.items())]
        text = "\n".join(
            [
                f"{verdict}; the run ends on all ranks, the same command goes on from the last checkpoint. Who "
                "was where:",
                *lines,
            ]
        )
        for rank, m in sorted(present.items(), reverse=True):  # rank 0, this process, last
            if rank == 0:
                time.sleep(0.5)
            _tell(m, end=text)


def _tell(member: _Member, **message: Any) -> None:
    with contextlib.suppress(OSError):
        member.connection.sendall(json.dumps(message).encode() + b"\n")


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def launched_address(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Where rank 0 may listen: the launcher reserves a port for every worker and the training uses
    none of them. None outside a launcher.
    """
    first = environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")[0]
    host, _, port = first.rpartition(":")
    return (host, int(port)) if host and int(environ.get("PADDLE_TRAINERS_NUM", "1")) > 1 else None

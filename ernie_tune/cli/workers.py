"""Starting `paddle.distributed.launch` when a run needs several processes: on several visible
cards, on several machines, or on a CPU as asked.

Variables as ERNIEKit's: NNODES, RANK, MASTER_ADDR, MASTER_PORT,
CUDA_VISIBLE_DEVICES, ERNIEKIT_DIST_LOG. Inside a worker that a launcher has started nothing is
started again. Refuses to know: paddle, what the workers do, degrees beyond their product.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie_tune import CPU_PLAN
from ernie_tune.checkpoint.lock import out_of_memory
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.arguments import ParallelArguments
from ernie_tune.config.host_memory import kills
from ernie_tune.config.language import say
from ernie_tune.config.secrets import PARENT_VARIABLE, remove_launcher_files, without_secrets
from ernie_tune.parallel.watch import Limits, Watch

LAUNCHER = Path(__file__).parents[1] / "launcher.py"
# What the launcher sets itself, or would hand to its workers as if it were their own.
_PASSED_ON = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_NOT_FOR_WORKERS = ("MASTER_ADDR", "MASTER_PORT", "NNODES", "RANK")


@dataclass(frozen=True)
class Start:
    """How many workers here, on which cards (none on a CPU), and this machine's place among
    several.
    """

    workers: int
    cards: tuple[str, ...] = ()
    nodes: int = 1
    node: int = 0
    master: str = ""

    @property
    def world(self) -> int:
        return self.workers * self.nodes

    def command(self, log_dir: Path, words: Sequence[str]) -> list[str]:
        """The launcher's command line; `words`: verb and arguments of ernie-tune."""
        where = ["--gpus", ",".join(self.cards)] if self.cards else ["--nproc_per_node", str(self.workers)]
        place = (
            ["--nnodes", str(self.nodes), "--rank", str(self.node), "--master", self.master] if self.nodes > 1 else []
        )
        launch = [
            sys.executable,
            "-u",
            "-W",
            "ignore:No ccache found",
            "-m",
            "paddle.distributed.launch",
            "--log_level",
            "WARNING",
            "--log_dir",
            str(log_dir),
        ]
        return [*launch, *where, *place, str(LAUNCHER), *words]

    def describe(self) -> str:
        machines = f", machine {self.node} of {self.nodes}" if self.nodes > 1 else ""
        on = f"on cards {','.join(self.cards)}" if self.cards else "on the CPU"
        return f"starting {self.workers} process(es) {on}{machines}"


def wanted(
    degrees: ParallelArguments, nproc: int | None, cards: Sequence[str], environ: Mapping[str, str]
) -> Start | None:
    """What is to be started; None where this process is the run itself. `cards`: those that paddle
    can use. `nproc`: as asked on the command line.

    Raises UsageError for variables that are no numbers, several machines without a meeting point,
    and more processes than cards.
    """
    if "PADDLE_TRAINER_ID" in environ:
        return None
    nodes, node = _number(environ, "NNODES", 1), _number(environ, "RANK", 0)
    if nodes > 1 and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
        raise UsageError(
            say(
                f"NNODES ({nodes}) must go with MASTER_ADDR and MASTER_PORT, the same on every machine, and RANK",
                f"NNODES（{nodes}）须与各机相同的 MASTER_ADDR、MASTER_PORT 以及 RANK 同时设置",
            )
        )
    if not 0 <= node < max(nodes, 1):
        raise UsageError(
            say(
                f"RANK ({node}) must be below NNODES ({nodes}); number the machines from 0",
                f"RANK（{node}）须小于 NNODES（{nodes}）；机器从 0 开始编号",
            )
        )
    product = degrees.tensor_model_parallel_size * degrees.pipeline_model_parallel_size * degrees.sharding_parallel_size
    here = nproc or len(cards) or -(-product // nodes)
    if cards and here > len(cards):
        raise UsageError(
            say(
                f"--nproc ({here}) must not exceed the visible cards ({len(cards)}); lower it",
                f"--nproc（{here}）不能超过可见的卡数（{len(cards)}）；请调小",
            )
        )
    if here * nodes == 1:
        return None
    master = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}" if nodes > 1 else ""
    return Start(here, tuple(cards[:here]), nodes, node, master)


def split_nproc(args: Sequence[str]) -> tuple[list[str], int | None]:
    """The words without `--nproc N`, and N. Raises UsageError for an N that is no positive
    number.
    """
    words = list(args)
    if "--nproc" not in words:
        return words, None
    at = words.index("--nproc")
    count = words[at + 1] if at + 1 < len(words) else "nothing"
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(
            say(
                f"--nproc ({count}) must be a number of processes, at least 1",
                f"--nproc（{count}）须为进程数，至少为 1",
            )
        )
    return words[:at] + words[at + 2 :], int(count)


def meet(what: Start, limits: Limits | None = None) -> None:
    """Wait for the other machines at the address that the launcher will use next. Raises
    ConnectionError naming those that do not come.
    """
    host, _, port = what.master.rpartition(":")

    def late(text: str) -> None:
        raise_here.append(text)

    raise_here: list[str] = []
    watch = Watch(what.node, what.nodes, (host, int(port)), limits, late, "machine")
    try:
        while not watch.all_here.wait(0.1):
            if raise_here:
                raise ConnectionError(raise_here[0])
    finally:
        watch.close()


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise UsageError(
            say(f"{name} ({text}) must be a number; correct the variable", f"{name}（{text}）须为数字；请改正该变量")
        )
    return int(text)


def visible_cards(environ: Mapping[str, str], gpu_build: bool) -> list[str]:
    """Numbers of the cards that the workers would use; none without the build of paddle for
    them.
    """
    if not gpu_build:
        return []
    if environ.get("CUDA_VISIBLE_DEVICES"):
        return [card.strip() for card in environ["CUDA_VISIBLE_DEVICES"].split(",") if card.strip()]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, line in enumerate(line for line in done.stdout.splitlines() if line.startswith("GPU "))]


def worker_environ(environ: Mapping[str, str], ours: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that the launcher starts with: those of this process, without secrets, which it
    would write down (its workers ask this process for them), and without what belongs to it alone.
    An empty CUDA_VISIBLE_DEVICES breaks the launcher, and each worker divides the cores itself:
    `ours` is what this process has set for itself.
    """
    ours = dict(CPU_PLAN.settings) if ours is None else ours
    drop = {*_NOT_FOR_WORKERS, *(name for name, value in ours.items() if environ.get(name) == value)}
    drop |= {"CUDA_VISIBLE_DEVICES"} if environ.get("CUDA_VISIBLE_DEVICES") == "" else set()
    kept = {name: value for name, value in without_secrets(environ).items() if name not in drop}
    path = [str(LAUNCHER.parents[1]), *filter(None, [environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), PARENT_VARIABLE: str(os.getpid())}


def log_folder(environ: Mapping[str, str], output_dir: str) -> Path:
    """Where the workers' own lines go, `workerlog.N`."""
    return Path(environ.get("ERNIEKIT_DIST_LOG") or Path(output_dir) / "log")


def start(what: Start, log_dir: Path, words: Sequence[str]) -> int:
    """Run the launcher to its end and return its exit code; the lines of rank 0 appear here.

    Ctrl-C, SIGTERM and the SIGHUP of a closed terminal are passed on to the workers, which finish
    their step and save; the second one ends them at once. The launcher itself does not see the
    first: it would kill its workers after half a minute.
    """
    if what.node:  # machines that share output_dir would write into one another's files
        log_dir = log_dir / f"machine_{what.node}"
    # the launcher's own files are for nobody else
    log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # or the launcher would show an earlier run's lines again
    for old in log_dir.glob("workerlog.*[0-9]"):
        old.replace(old.with_name(f"{old.name}.old"))
    print(
        say(
            f"ernie_tune: {what.describe()}; every process writes {log_dir}/workerlog.N",
            f"ernie_tune：{what.describe()}；各进程的日志在 {log_dir}/workerlog.N",
        ),
        file=sys.stderr,
        flush=True,
    )
    killed_before = kills()
    child = subprocess.Popen(what.command(log_dir, words), env=worker_environ(os.environ), start_new_session=True)
    asked = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            child.terminate()
            return
        for worker in _children(child.pid):
            os.kill(worker, signal.SIGINT)

    before = {
        number: signal.signal(number, pass_on)
        for number in _PASSED_ON
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        remove_launcher_files(log_dir)
    if code:
        print(
            say(
                f"ernie_tune: ended with exit code {code}; {_last_words(log_dir)}",
                f"ernie_tune：以退出码 {code} 结束；{_last_words(log_dir)}",
            ),
            file=sys.stderr,
        )
    if code and kills() > killed_before:
        print(say("ernie_tune: {why}", "ernie_tune：{why}", why=out_of_memory()), file=sys.stderr)
    return 130 if asked and code else code


def _children(pid: int) -> list[int]:
    """Processes that `pid` has started, by /proc; none where there is no such thing."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in file.read_text().split()]
    except OSError:
        return []


def _last_words(log_dir: Path) -> str:
    logs = sorted(log_dir.glob("workerlog.*"))
    return (
        f"each process's lines are in {log_dir} ({', '.join(p.name for p in logs)})"
        if logs
        else f"no process has written to {log_dir}"
    )

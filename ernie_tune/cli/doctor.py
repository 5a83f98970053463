"""`ernie-tune doctor`: this machine in plain text, without loading paddle.

Refuses to know: secrets (a hub token is only said to exist), the network, how a run is configured.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ernie_tune import CPU_PLAN, __version__
from ernie_tune.cli import workers
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.arguments import ParallelArguments
from ernie_tune.config.cpu import available_cores, read_cpuinfo
from ernie_tune.config.host_memory import GROUPS, PROC, container_limits, machine_memory
from ernie_tune.config.language import say

_GIB = 2**30
_CORE = ("numpy", "safetensors", "sentencepiece", "pillow", "pyyaml", "tqdm", "jinja2")
_OPTIONAL = (
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddlenlp",
    "paddleformers",
    "av",
    "matplotlib",
    "visualdl",
    "tensorboardX",
    "fastapi",
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_DEBUG_CPU_TYPE",
    "NNODES",
    "RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_TOKENS = {
    "AI Studio": ("AISTUDIO_ACCESS_TOKEN", ".cache/aistudio/.auth/token"),
    "Hugging Face": ("HF_TOKEN", ".cache/huggingface/token"),
    "ModelScope": ("MODELSCOPE_API_TOKEN", ".modelscope/credentials"),
}


def run(args: list[str]) -> int:
    """ernie-tune doctor [--dist [--nproc N]] [--card [DEVICE]]

    Prints versions, processor, memory, disk, cards, ports and hub tokens (yes or no), then what
    looks wrong and how to mend it. Made to be pasted into an issue. --dist: starts one process a
    card (or N, on a CPU too; on each of several machines with NNODES, RANK, MASTER_ADDR,
    MASTER_PORT) and measures how they talk; a rank that is missing or does not answer is named
    within 60 s. --card: does the card (gpu:0, or DEVICE; cpu puts the CPU in its place) compute
    what a CPU computes, and how fast? A few minutes, no download; exit code 1 where a line is
    wrong.
    """
    words, nproc = workers.split_nproc(args)
    if words == ["--dist"]:
        return between_ranks(nproc)
    if words[:1] == ["--card"] and len(words) < 3:
        return of_card(words[1] if words[1:] else "")
    if args:
        raise UsageError(say(f"doctor takes no words, got {args[0]!r}", f"doctor 不需要参数，得到 {args[0]!r}"))
    versions = {name: found for name in (*_CORE, *_OPTIONAL) if (found := _version(name))}
    cards = _cards()
    print("\n".join(describe(versions, cards, os.environ)))
    for problem in diagnose(versions, cards, os.environ, _shared_memory()) or ["nothing"]:
        print(say(f"to mend: {problem}", f"待修复：{problem}"))
    return 0


def of_card(device: str) -> int:
    """Look a card over and print a page to paste into an issue."""
    import paddle

    from ernie_tune.models.startup import prepare_device
    from ernie_tune.train.card_check import check_card

    prepare_device()
    device = device or paddle.get_device()
    if device != "cpu" and not (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        raise UsageError(
            say(
                f"device ({device}) must be a card that this Paddle sees, and it sees none; install paddlepaddle-gpu, or give cpu",
                f"设备（{device}）须为当前 Paddle 可见的卡，但一张也没有；请安装 paddlepaddle-gpu，或写 cpu",
            )
        )
    versions = {name: found for name in (*_CORE, *_OPTIONAL) if (found := _version(name))}
    print("\n".join(describe(versions, _cards(), os.environ)))
    wrong = 0
    for line in check_card(device):
        verdict = {None: "    ", True: "ok  ", False: say("BAD ", "有误")}[line.passed]
        wrong += line.passed is False
        print(f"{verdict} {line.about}: {line.found}", flush=True)
    if device != "cpu" and paddle.device.cuda.device_count() > 1:
        print(
            say(
                "several cards: `ernie-tune doctor --dist` has them talk", "多张卡：请再运行 `ernie-tune doctor --dist`"
            )
        )
    print(
        say(f"{device}: {wrong} lines are wrong", f"{device}：{wrong} 项有误")
        if wrong
        else say(f"{device}: every line is as it should be", f"{device}：各项正常")
    )
    return int(wrong > 0)


def describe(versions: Mapping[str, str], cards: list[str], environ: Mapping[str, str]) -> list[str]:
    """The machine, one fact a line."""
    cpuinfo, cores, disk = read_cpuinfo(), available_cores(), shutil.disk_usage(".")
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", cpuinfo)]
    return [
        f"ernie-tune: {__version__}",
        f"python: {platform.python_version()} ({platform.platform()})",
        f"processor: {model[1] if model else platform.machine()}, {cores} of {os.cpu_count()} cores, {' '.join(flags) or 'no vector flags'}",
        CPU_PLAN.line,
        f"memory: {_memory()}",
        f"disk here: {disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f}",
        f"shared memory: {_size(_shared_memory())}",
        f"packages: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        *(f"card: {card}" for card in cards or ["none (no nvidia-smi)"]),
        f"port on 127.0.0.1: {_port(environ)}",
        *(f"token for {hub}: {_token(hub, environ)}" for hub in _TOKENS),
        f"environment: {' '.join(f'{name}={environ[name]!r}' for name in _VARIABLES if name in environ) or 'nothing set'}",
    ]


def diagnose(
    versions: Mapping[str, str], cards: list[str], environ: Mapping[str, str], shared_bytes: int | None
) -> list[str]:
    """What looks wrong, with the repair. `cards`: lines of nvidia-smi; `shared_bytes`: size of
    /dev/shm, None if there is none.
    """
    cpu, gpu = "paddlepaddle" in versions, "paddlepaddle-gpu" in versions
    found: list[str] = []
    if absent := [name for name in _CORE if name not in versions]:
        found.append(
            say(f"packages are missing: pip install {' '.join(absent)}", f"缺少软件包：pip install {' '.join(absent)}")
        )
    if cpu and gpu:
        found.append(
            say(
                "paddlepaddle and paddlepaddle-gpu overwrite each other: pip uninstall both, then install one",
                "paddlepaddle 与 paddlepaddle-gpu 互相覆盖：请 pip uninstall 两者，再安装其一",
            )
        )
    if not cpu and not gpu:
        found.append(
            say(
                "paddle is missing: pip install paddlepaddle, or paddlepaddle-gpu from Paddle's own index for a card",
                "缺少 paddle：pip install paddlepaddle；有显卡请从 Paddle 自己的源安装 paddlepaddle-gpu",
            )
        )
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        if name in versions and _numbers(versions[name]) < (3, 3):
            found.append(
                say(
                    f"{name} {versions[name]} is too old: pip install -U '{name}>=3.3'",
                    f"{name} {versions[name]} 过旧：pip install -U '{name}>=3.3'",
                )
            )
    if gpu and not cards:
        found.append(
            say(
                "paddlepaddle-gpu is installed, and nvidia-smi shows no card: check the driver, or "
                "install paddlepaddle",
                "已安装 paddlepaddle-gpu，但 nvidia-smi 没有显示加速卡：请检查驱动，或改装 paddlepaddle",
            )
        )
    if cards and cpu and not gpu:
        found.append(
            say(
                "there is a card, and paddlepaddle is the build without it: install paddlepaddle-gpu instead to use it",
                "有加速卡，但 paddlepaddle 是不支持它的版本：请改装 paddlepaddle-gpu",
            )
        )
    if environ.get("CUDA_VISIBLE_DEVICES") == "":
        found.append(
            say(
                "CUDA_VISIBLE_DEVICES is empty, which breaks paddle.distributed.launch: unset it",
                "CUDA_VISIBLE_DEVICES 为空，会使 paddle.distributed.launch 出错：请取消该变量",
            )
        )
    if shared_bytes is not None and shared_bytes < 2**28:
        found.append(
            say(
                f"shared memory is small ({_size(shared_bytes)}): keep dataloader_num_workers at 0",
                f"共享内存过小（{_size(shared_bytes)}）：dataloader_num_workers 请保持为 0",
            )
        )
    return found


def between_ranks(nproc: int | None) -> int:
    """Start the ranks, or be one of them."""
    if "PADDLE_TRAINER_ID" in os.environ:
        from ernie_tune.parallel.probe import probe

        probe(print)
        return 0
    start = workers.wanted(
        ParallelArguments(), nproc, workers.visible_cards(os.environ, installed("paddlepaddle-gpu")), os.environ
    )
    if start is None:
        raise UsageError(
            say(
                "--dist needs several ranks: add --nproc 2, or set NNODES",
                "--dist 需要多个进程：请加 --nproc 2，或设置 NNODES",
            )
        )
    if start.nodes > 1:
        workers.meet(start)
    logs = os.environ.get("ERNIEKIT_DIST_LOG")
    folder = Path(logs or tempfile.mkdtemp(prefix="ernie-tune-doctor-"))
    code = workers.start(start, folder, ["doctor", "--dist"])
    if not code and not logs:  # the launcher's files hold the environment, tokens too
        shutil.rmtree(folder, ignore_errors=True)
    return code


def installed(name: str) -> bool:
    """Whether a distribution is there, without importing it."""
    return _version(name) is not None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _size(count: int | None) -> str:
    return "none" if count is None else f"{count / _GIB:.1f} GiB"


def _shared_memory() -> int | None:
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def _memory(proc: Path = PROC, groups: Path = GROUPS) -> str:
    machine = machine_memory(proc)
    if machine is None:
        return "unknown"
    total, free = machine
    bounds = [limit for limit, _ in container_limits(proc, groups) if limit < total]
    return f"{_size(free)} free of {_size(total)}" + (f", container limit {_size(min(bounds))}" if bounds else "")


def _cards() -> list[str]:
    """One line a card: name, memory, compute capability, driver. Empty without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _port(environ: Mapping[str, str]) -> str:
    wanted = environ.get("MASTER_PORT", "0")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", int(wanted)))
        except (OSError, ValueError, OverflowError) as error:
            return f"cannot bind {wanted}: {error}"
        return f"ok ({probe.getsockname()[1]})"


def _token(hub: str, environ: Mapping[str, str]) -> str:
    variable, file = _TOKENS[hub]
    return "yes" if environ.get(variable) or (Path.home() / file).is_file() else "no"

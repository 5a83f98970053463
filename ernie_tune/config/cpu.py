"""Environment variables that make paddle's matrix products fast on a CPU; to be set before paddle
loads. And what paddle says of them while it loads.

Refuses to know: paddle (whether the product really is fast is measured elsewhere), what the run
computes.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# what MKL's AVX-512 kernels use
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_REMARKS = ("WARNING: OMP_NUM_THREADS set to", "PLEASE USE OMP_NUM_THREADS WISELY")


@dataclass(frozen=True)
class CpuPlan:
    """Variables to set, and one line that says so. `too_late`: paddle is loaded, setting them now
    changes nothing.
    """

    settings: tuple[tuple[str, str], ...]
    line: str
    too_late: bool = False


def plan_cpu(cpuinfo: str, environ: Mapping[str, str], cores: int, workers: int, paddle_loaded: bool) -> CpuPlan:
    """Decide from the text of /proc/cpuinfo, the environment, the cores this process may use, and
    the workers that share them.

    Old MKL takes its slow path on AMD unless MKL_DEBUG_CPU_TYPE names the instruction set: 7
    AVX-512, 5 AVX2. What the user has set stays; either thread variable speaks for both.
    """
    settings: dict[str, str] = {}
    kind = _mkl_type(cpuinfo)
    if kind and "MKL_DEBUG_CPU_TYPE" not in environ:
        settings["MKL_DEBUG_CPU_TYPE"] = kind
    threads = max(1, cores // max(1, workers))
    if not any(_by_user(name, environ) for name in _THREADS):
        settings |= dict.fromkeys(_THREADS, str(threads))
    text = " ".join(f"{name}={value}" for name, value in settings.items())
    if not settings:
        return CpuPlan((), "cpu: nothing to set")
    if paddle_loaded:
        return CpuPlan(
            tuple(settings.items()),
            f"cpu: paddle is already loaded; for speed start again with: export {text}",
            too_late=True,
        )
    return CpuPlan(tuple(settings.items()), f"cpu: {cores} core(s), {workers} worker(s): {text}")


def _mkl_type(cpuinfo: str) -> str | None:
    """Value of MKL_DEBUG_CPU_TYPE, None where the variable does not help (not AMD, or no AVX2)."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if not flags or not re.search(r"^vendor_id\s*:\s*AuthenticAMD\s*$", cpuinfo, re.MULTILINE):
        return None
    has = set(flags[1].split())
    return "7" if has >= _AVX512 else "5" if "avx2" in has else None


def _by_user(name: str, environ: Mapping[str, str]) -> bool:
    """Whether the user set `name`. Loading paddle sets OMP_NUM_THREADS=1, and a launcher, which
    loads it, hands that on to its workers.
    """
    inherited = name == "OMP_NUM_THREADS" and environ.get(name) == "1" and "PADDLE_TRAINER_ID" in environ
    return name in environ and not inherited


def workers_here(environ: Mapping[str, str]) -> int:
    """Worker processes on this machine as `paddle.distributed.launch` tells them; 1 without a
    launcher.
    """
    for name in ("PADDLE_LOCAL_SIZE", "PADDLE_TRAINERS_NUM"):
        if environ.get(name, "").isdecimal():
            return max(1, int(environ[name]))
    return 1


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, cut to the container's quota (cgroup 2 or 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for pattern in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        files = [cgroup / name for name in pattern]
        if all(file.is_file() for file in files):
            quota, period = " ".join(file.read_text() for file in files).split()[:2]
            if quota.isdecimal() and int(period) > 0:  # "max" and -1 mean no quota
                cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> str:
    """The text that describes the processor; empty where the system has none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@lru_cache(maxsize=1)
def has_math_library() -> bool:
    """Whether the paddle that is installed brings the math library of x86-64 processors; where none
    is installed, as its wheels do. Paddle is not loaded for it.
    """
    found = importlib.util.find_spec("paddle")
    if found is None or found.origin is None:
        return True
    return (Path(found.origin).parent / "libs" / "libmklml_intel.so").is_file()


def prepare_cpu() -> CpuPlan:
    """Set what `plan_cpu` decides for this process, unless paddle is loaded already. The caller
    prints the line.
    """
    plan = plan_cpu(read_cpuinfo(), os.environ, available_cores(), workers_here(os.environ), "paddle" in sys.modules)
    if not plan.too_late:
        os.environ.update(plan.settings)
    return plan


@contextmanager
def while_paddle_loads() -> Iterator[None]:
    """Keep two remarks of paddle's from the user: that OMP_NUM_THREADS, which `prepare_cpu` sets,
    is not 1, and that no ccache is installed (nothing is compiled here). Whatever else is said is
    passed on when loading ends.
    """
    heard = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stderr(heard):
            warnings.filterwarnings("ignore", message="No ccache found")
            yield
    finally:
        for line in heard.getvalue().splitlines():
            if not line.startswith(_REMARKS):
                print(line, file=sys.stderr)

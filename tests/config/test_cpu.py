"""The CPU plan on the processors that were measured and on others; nothing here
changes this process.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ernie_tune.config import cpu
from ernie_tune.config.cpu import (
    available_cores,
    plan_cpu,
    prepare_cpu,
    read_cpuinfo,
    while_paddle_loads,
    workers_here,
)

AVX512 = "fpu sse4_2 avx avx2 avx512f avx512dq avx512cd avx512bw avx512vl"
ZEN4 = f"processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9004\nflags\t\t: {AVX512}\nbugs\t\t: none\n"
ZEN2 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse4_2 avx avx2\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\nflags\t\t: avx2\n"
OLD_AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sse4_2 avx\n"
INTEL = f"vendor_id\t: GenuineIntel\nflags\t\t: {AVX512}\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes sve\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("text", "kind"), [(ZEN4, "7"), (ZEN2, "5"), (OLD_AMD, None), (INTEL, None), (ARM, None), ("", None)]
)
def test_processors(text: str, kind: str | None) -> None:
    plan = plan_cpu(text, {}, cores=8, workers=1, paddle_loaded=False)
    want = {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "8"} | ({"MKL_DEBUG_CPU_TYPE": kind} if kind else {})
    assert dict(plan.settings) == want
    assert not plan.too_late
    assert "\n" not in plan.line
    assert all(f"{name}={value}" in plan.line for name, value in want.items())


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 2, "4"), (8, 3, "2"), (2, 4, "1"), (1, 1, "1")])
def test_workers_share_the_cores(cores: int, workers: int, threads: str) -> None:
    assert dict(plan_cpu("", {}, cores, workers, False).settings)["OMP_NUM_THREADS"] == threads


def test_what_the_user_set_stays() -> None:
    assert plan_cpu(ZEN4, {"MKL_DEBUG_CPU_TYPE": "5", "OMP_NUM_THREADS": "3"}, 8, 1, False).settings == ()
    assert dict(plan_cpu(ZEN4, {"MKL_NUM_THREADS": "1"}, 8, 1, False).settings) == {"MKL_DEBUG_CPU_TYPE": "7"}
    assert "nothing to set" in plan_cpu("", {"OMP_NUM_THREADS": "3"}, 8, 1, False).line


def test_the_launcher_is_not_the_user() -> None:
    # paddle.distributed.launch loads paddle, which sets OMP_NUM_THREADS=1, and its workers inherit
    # that
    worker = {"PADDLE_TRAINER_ID": "0", "OMP_NUM_THREADS": "1"}
    assert dict(plan_cpu("", worker, 8, 2, False).settings) == {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"}
    assert plan_cpu("", {**worker, "OMP_NUM_THREADS": "2"}, 8, 2, False).settings == ()
    assert plan_cpu("", {"OMP_NUM_THREADS": "1"}, 8, 1, False).settings == ()


def test_too_late() -> None:
    plan = plan_cpu(ZEN2, {}, 2, 1, paddle_loaded=True)
    assert plan.too_late
    assert "export MKL_DEBUG_CPU_TYPE=5 OMP_NUM_THREADS=2 MKL_NUM_THREADS=2" in plan.line


def test_workers_here() -> None:
    assert workers_here({}) == 1
    assert workers_here({"PADDLE_LOCAL_SIZE": "4", "PADDLE_TRAINERS_NUM": "16", "PADDLE_RANK_IN_NODE": "1"}) == 4
    assert workers_here({"PADDLE_TRAINERS_NUM": "2"}) == 2
    assert workers_here({"PADDLE_LOCAL_SIZE": "?"}) == 1


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "300000 100000"}, 3), ({"cpu.max": "50000 100000"}, 1), ({"cpu.max": "max 100000"}, 64), ({}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)  # fmt: skip
def test_quota(files: dict[str, str], limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == limit


def test_prepare_sets_unless_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    monkeypatch.setattr(cpu.os, "environ", environ)
    monkeypatch.setattr(cpu, "read_cpuinfo", lambda: ZEN4)
    monkeypatch.setitem(sys.modules, "paddle", sys)
    assert prepare_cpu().too_late
    assert environ == {}
    monkeypatch.delitem(sys.modules, "paddle")
    assert dict(prepare_cpu().settings) == environ
    assert environ["MKL_DEBUG_CPU_TYPE"] == "7"


def test_no_cpuinfo(tmp_path: Path) -> None:
    assert read_cpuinfo(tmp_path / "absent") == ""


def test_only_known_remarks_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        with while_paddle_loads():
            print("WARNING: OMP_NUM_THREADS set to 2, not 1. The computation speed", file=sys.stderr)
            print("PLEASE USE OMP_NUM_THREADS WISELY.", file=sys.stderr)
            print("WARNING: something else", file=sys.stderr)
            warnings.warn("No ccache found. Please be aware", stacklevel=1)
            raise KeyError("loading failed")

    with pytest.raises(KeyError, match="loading failed"):
        load()
    assert capsys.readouterr().err == "WARNING: something else\n"


def test_loading_paddle_says_nothing() -> None:
    code = "from ernie_tune import AutoModel"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""

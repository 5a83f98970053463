"""Start a worker on N processes with Paddle's launcher and collect what the ranks wrote: private
logs, a time limit, nothing left running.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(folder: Path, processes: int, script: Path, *args: str, timeout_s: float = 240) -> tuple[int, str]:
    """(exit status, the end of every rank's log). The launcher is told to end its workers when the
    time is over.
    """
    logs = folder / "logs"
    path = os.pathsep.join([str(ROOT), str(HERE), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "GLOG_minloglevel": "2", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        str(processes),
        "--log_dir",
        str(logs),
    ]
    for name in [n for n in env if n.startswith(("PADDLE_", "FLAGS_selected"))]:
        del env[name]
    process = subprocess.Popen(
        [*command, str(script), *args],
        env=env,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = 124
    finally:
        # the workers are in sessions of their own: only the launcher can end them
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    tails = [f"--- {p.name}\n" + p.read_text(errors="replace")[-3000:] for p in sorted(logs.glob("workerlog.*"))]
    return code, "\n".join(tails)


def parity(
    folder: Path, processes: int, cases: Sequence[dict[str, Any]], timeout_s: float = 240
) -> list[dict[str, Any]]:
    """Run the cases; one result a case: {"name", "worst": {kind: (difference, where)}} over all
    ranks, or {"name", "error"}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    code, tails = launch(folder, processes, HERE / "worker.py", str(folder), timeout_s=timeout_s)
    ranks = [json.loads(p.read_text()) if (p := folder / f"rank_{r}.json").exists() else [] for r in range(processes)]
    merged = []
    for i, case in enumerate(cases):
        found = [rank[i] for rank in ranks if len(rank) > i]
        errors = [f["error"] for f in found if "error" in f]
        if errors or len(found) < processes:
            merged.append(
                {
                    "name": case["name"],
                    "error": errors[0] if errors else f"exit {code}\n{tails}",
                    "trace": [f.get("trace") for f in found],
                }
            )
            continue
        worst = {kind: max(tuple(f["worst"][kind]) for f in found) for kind in found[0]["worst"]}
        merged.append({"name": case["name"], "worst": worst, "seconds": max(f["seconds"] for f in found)})
    return merged


def largest(result: dict[str, Any]) -> float:
    """The largest difference of any kind; infinite where the run failed."""
    return max(d for d, _ in result["worst"].values()) if "worst" in result else float("inf")

"""One process of a parity run: `worker.py FOLDER`, started by the launcher. FOLDER/cases.json:
[{"name", "degrees", "job", "mutant"}]. Each rank writes what differed to FOLDER/rank_N.json.
Several layouts run in one start, which costs seconds.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import paddle.distributed as dist
from cases import Job, compare, run
from mutants import applied
from paddle.distributed.fleet.base import topology

from ernie_tune.config.layout import Layout
from ernie_tune.parallel.mesh import Mesh, init_mesh


def one(folder: Path, case: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    job = Job(**{k: tuple(v) if isinstance(v, list) else v for k, v in case["job"].items()})
    # Fleet lays out a process once; here it lays out one after the other
    topology._HYBRID_PARALLEL_GROUP = None
    mesh: Mesh = init_mesh(Layout(**case["degrees"]))
    if job.key not in references:  # one rank computes it, the others read
        file = folder / f"{job.key}.pickle"
        if dist.get_rank() == 0:
            file.with_suffix(".part").write_bytes(pickle.dumps(run(job)))
            file.with_suffix(".part").rename(file)
        mesh.group("world").objects(None)
        references[job.key] = pickle.loads(file.read_bytes())
    with applied(case.get("mutant", "")):
        got = run(job, mesh, self_check=case.get("self_check", True))
    return compare(references[job.key], got, mesh)


def main() -> None:
    folder = Path(sys.argv[1])
    results: list[dict[str, Any]] = []
    references: dict[str, Any] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        start = time.perf_counter()
        try:
            found: dict[str, Any] = {"worst": one(folder, case, references)}
        except (
            ValueError,
            RuntimeError,
            AssertionError,
            KeyError,
            OSError,
            IndexError,
            AttributeError,
            TypeError,
        ) as error:
            found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        results.append({"name": case["name"], "seconds": round(time.perf_counter() - start, 1), **found})
        (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(results))
        if "error" in found and not case.get("all_raise"):
            raise SystemExit(1)  # the others may wait for this rank: end the run


if __name__ == "__main__":
    main()

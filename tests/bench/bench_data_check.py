"""Speed and memory of `data check` on text: short (about 300 bytes) and ordinary (about 1 kB) chat
rows, 10,000 and 1,000,000 of them.

usage: python tests/bench/bench_data_check.py [--rows 1000000] [--rounds 3]
All checks are on (formats, roles, markers, answers, duplicates, near duplicates, statistics). One
process, one thread; each number is the best over the rounds, each round a fresh process. MB/s is of
processor time, so that a busy machine hurts less; wall_mb_s beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import ernie_tune

SENTENCES = {"short": (1, 3), "chat": (5, 10)}  # in a question, in an answer
CHILD = """
import json, resource, sys, time
from ernie_tune.data.doctor.scan import Scan
from ernie_tune.data.processor import Processor
from ernie_tune.data.sources import DatasetEntry
scan = Scan(Processor.bundled())
start = time.process_time()
report = scan.run([DatasetEntry(sys.argv[1])])
seconds = time.process_time() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"rows": report.stats.rows, "cpu": seconds, "wall": report.seconds, "peak_mib": peak, "found": report.findings.counts}))
"""


def sentences(random_: random.Random) -> list[str]:
    """A pool of English and Chinese sentences of about 60 bytes."""
    syllables = ["ka", "to", "mi", "ren", "so", "lu", "pe", "da", "vi", "no", "shi", "gor", "el", "an", "tu"]
    words = ["".join(random_.choices(syllables, k=random_.randint(1, 3))) for _ in range(3000)]
    signs = [chr(code) for code in range(0x4E00, 0x5A00)]
    english = [" ".join(random_.choices(words, k=10)).capitalize() + "." for _ in range(20000)]
    return english + ["".join(random_.choices(signs, k=20)) + "。" for _ in range(20000)]


def write(path: Path, rows: int, counts: tuple[int, int]) -> None:
    random_ = random.Random(0)
    pool = sentences(random_)
    with open(path, "w", encoding="utf-8") as out:
        for i in range(rows):
            question, answer = (" ".join(random_.choices(pool, k=k)) for k in counts)
            turns = [{"role": "user", "content": f"{i}: {question}"}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def measure(path: Path, rounds: int) -> dict[str, object]:
    megabytes = path.stat().st_size / 1e6
    runs = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    first = runs[0]
    return {
        "rows": first["rows"],
        "bytes_per_row": round(megabytes * 1e6 / first["rows"]),
        "mb_s": round(megabytes / min(run["cpu"] for run in runs), 1),
        "wall_mb_s": round(megabytes / min(run["wall"] for run in runs), 1),
        "peak_mib": round(min(run["peak_mib"] for run in runs), 1),
        "found": first["found"],
    }


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--rows", type=int, default=1_000_000)
    args.add_argument("--rounds", type=int, default=3)
    a = args.parse_args()
    machine = platform.processor() or platform.machine()
    print(json.dumps({"machine": machine, "cores": os.cpu_count(), "version": ernie_tune.__version__}))
    with tempfile.TemporaryDirectory() as folder:
        for name, counts in SENTENCES.items():
            for rows in dict.fromkeys((min(10_000, a.rows), a.rows)):
                path = Path(folder) / f"{name}.jsonl"
                write(path, rows, counts)
                print(json.dumps({"name": name, **measure(path, a.rounds)}), flush=True)


if __name__ == "__main__":
    main()

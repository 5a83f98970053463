"""A few seconds of tests/bench/bench_serve.py: a crowd of clients, no answer lost, failed or given
to another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "bench_serve.py"


def test_a_crowd_gets_its_own_answers() -> None:
    words = ["--preset", "tiny-a", "--clients", "16", "--seconds", "3", "--single_seconds", "1", "--max_tokens", "8"]
    done = subprocess.run(
        [sys.executable, str(BENCH), *words, "--questions", "16"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong_or_failed"] == 0
    assert found["answers"] >= 16
    assert found["different_answers"] >= 0.9 * found["questions"] >= 8, "or a mix-up would not be seen"
    assert found["ratio"] > 1, "the crowd shares the model's steps"

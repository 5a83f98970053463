#!/usr/bin/env bash
# Everything a commit must pass, from nothing but Python, pip and git: makes or reuses .venv, installs .[cpu,dev], lints, runs all tests.
# usage: bash tests/run.sh [pytest arguments]        PYTHON=python3.12 bash tests/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=.venv/.installed
if [ ! -f "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cpu,dev]"
  touch "$stamp"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy ernie_tune
# One process a core, each computing with one thread: a file of tests stays in one process.
workers="$(.venv/bin/python -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n "$workers" --dist loadfile "$@"

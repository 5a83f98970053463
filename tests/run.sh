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
# The studio is tried in a browser: $CHROMIUM, the system's, or one that playwright may fetch.
# Without any the rest is tested all the same, and the line below and pytest's summary say so.
browser() {
  for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome google-chrome-stable; do
    [ -n "$name" ] && command -v "$name" >/dev/null && return 0
  done
  timeout 60 .venv/bin/playwright install --no-shell chromium >/dev/null 2>&1
}
browser || echo "NO CHROMIUM HERE: THE STUDIO IS NOT TRIED IN A BROWSER (apt-get install chromium)" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy ernie_tune
# One process a core, each computing with one thread: a file of tests stays in one process.
workers="$(.venv/bin/python -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n "$workers" --dist loadfile "$@"

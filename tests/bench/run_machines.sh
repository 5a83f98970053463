#!/usr/bin/env bash
# The whole suite as other machines would run it: each set of instructions that MKL can be told to use, with one thread and with two. Prints a table.
# usage: bash tests/bench/run_machines.sh [pytest words ...]        about 20 minutes a line on two cores; PYTHON as in tests/run.sh
# MKL_DEBUG_CPU_TYPE: unset (MKL asks the processor: slow paths on AMD), 4 AVX, 5 AVX2, 7 AVX-512 (left out where the processor has none).
set -uo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python3
kinds=(unset 4 5)
if grep -qw avx512f /proc/cpuinfo 2> /dev/null; then kinds+=(7); fi
failed=0
for kind in "${kinds[@]}"; do
  for threads in 1 2; do
    started=$SECONDS
    variables=(OMP_NUM_THREADS="$threads" MKL_NUM_THREADS="$threads")
    # An empty value is one that the user has set: nothing else is chosen for it.
    if [ "$kind" = unset ]; then variables+=(MKL_DEBUG_CPU_TYPE=); else variables+=(MKL_DEBUG_CPU_TYPE="$kind"); fi
    said="$(env "${variables[@]}" "$python" -m pytest tests -q "$@" 2>&1)" && state=passed || { state=FAILED failed=1; }
    printf '%-6s MKL_DEBUG_CPU_TYPE=%-5s threads=%s  %4d s  %s\n' "$state" "$kind" "$threads" $((SECONDS - started)) "$(tail -1 <<< "$said")"
    [ "$state" = passed ] || grep -E '^(FAILED|ERROR)' <<< "$said"
  done
done
exit "$failed"

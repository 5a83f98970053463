#!/usr/bin/env bash
# N processes on this machine's CPU: every parallel layout can be tried without a card. The cores are divided among the processes.
# usage: bash launch/cpu.sh N FILE.yaml [setting=value ...]
# e.g.:  bash launch/cpu.sh 4 examples/digits/fresh.yaml tensor_model_parallel_size=2 sequence_parallel=true pipeline_model_parallel_size=2
# Variables: ERNIEKIT_DIST_LOG, VERB and PYTHON as in launch/node.sh.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2> /dev/null; then
  sed -n '2,3p' "$0" >&2
  exit 2
fi
root="$(cd "$(dirname "$0")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; else PYTHON=python3; fi
fi
processes="$1"
shift
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m ernie_tune validate "$@" > /dev/null

# Paddle's launcher fails on an empty list of cards; and the variables of a cluster's job are not about these processes.
# Paddle's launcher writes its environment into the log folder: secrets stay out of it. (`ernie-tune train` hands them to the workers another way.)
while read -r name; do unset "$name"; done < <(compgen -e | grep -iE 'token|key|secret|passw|credential|auth|cookie|private' || true)
unset CUDA_VISIBLE_DEVICES NNODES RANK MASTER_ADDR MASTER_PORT
exec "$PYTHON" -u -W "ignore:No ccache found" -m paddle.distributed.launch --log_level WARNING --log_dir "${ERNIEKIT_DIST_LOG:-output/dist_log}" \
  --nproc_per_node "$processes" "$root/ernie_tune/launcher.py" "${VERB:-train}" "$@"

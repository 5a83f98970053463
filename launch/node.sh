#!/usr/bin/env bash
# One machine of a run: starts a process on each of its cards. On several machines run the same command on each, with RANK 0, 1, ...
# usage: NNODES=2 RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash launch/node.sh FILE.yaml [setting=value ...]
#
# Variables, with the names that ERNIEKit uses:
#   NNODES                how many machines (1)
#   RANK                  number of this machine, from 0 (0)
#   MASTER_ADDR           address of machine 0, the same on every machine; only for several machines
#   MASTER_PORT           a free port there (29500)
#   CUDA_VISIBLE_DEVICES  the cards to use (all)
#   ERNIEKIT_DIST_LOG     folder of the processes' lines, workerlog.N (output/dist_log; of several machines, output/dist_log/machine-RANK)
#   VERB                  train (default) or eval
#   PYTHON                the interpreter (.venv/bin/python here, or python3)
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,3p' "$0" >&2
  exit 2
fi
root="$(cd "$(dirname "$0")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; else PYTHON=python3; fi
fi
nodes="${NNODES:-1}" rank="${RANK:-0}" port="${MASTER_PORT:-29500}"

place=() logs=output/dist_log
if [ "$nodes" -gt 1 ]; then
  logs="$logs/machine-$rank"  # processes of the same number would otherwise share a file of a shared disk
  : "${MASTER_ADDR:?several machines (NNODES=$nodes) need MASTER_ADDR, the address of machine 0}"
  [ "$rank" -lt "$nodes" ] || { echo "RANK ($rank) must be below NNODES ($nodes); number the machines from 0" >&2; exit 2; }
  place=(--nnodes "$nodes" --rank "$rank" --master "$MASTER_ADDR:$port")
fi

# An empty list of cards makes the launcher fail; no list means all.
cards=()
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  cards=(--gpus "$CUDA_VISIBLE_DEVICES")
elif command -v nvidia-smi > /dev/null && count="$(nvidia-smi -L | grep -c '^GPU ')" && [ "$count" -gt 0 ]; then
  cards=(--gpus "$(seq -s, 0 $((count - 1)))")
else
  echo "no cards here; on a CPU: bash launch/cpu.sh N $*" >&2
  exit 1
fi

# Settings and layout are checked before anything is started: the same message here as on every rank later, but once.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m ernie_tune validate "$@" > /dev/null

# The launcher gives its workers variables of the same names; ours must not get in their way.
# Paddle's launcher writes its environment into the log folder: secrets stay out of it. (`ernie-tune train` hands them to the workers another way.)
while read -r name; do unset "$name"; done < <(compgen -e | grep -iE 'token|key|secret|passw|credential|auth|cookie|private' || true)
unset NNODES RANK MASTER_ADDR MASTER_PORT
exec "$PYTHON" -u -W "ignore:No ccache found" -m paddle.distributed.launch --log_level WARNING --log_dir "${ERNIEKIT_DIST_LOG:-$logs}" \
  "${place[@]}" "${cards[@]}" "$root/ernie_tune/launcher.py" "${VERB:-train}" "$@"

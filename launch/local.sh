#!/usr/bin/env bash
# All cards of this machine, or those in CUDA_VISIBLE_DEVICES.
# usage: [CUDA_VISIBLE_DEVICES=0,1,2,3] bash launch/local.sh FILE.yaml [setting=value ...]
# `ernie-tune train FILE.yaml` does the same; this file shows what that is. Variables: see launch/node.sh.
set -euo pipefail
unset NNODES RANK MASTER_ADDR MASTER_PORT
exec bash "$(dirname "$0")/node.sh" "$@"

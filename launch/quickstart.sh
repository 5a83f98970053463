#!/usr/bin/env bash
# From Python 3.10-3.13, pip and git to a fine-tuned model: makes or reuses .venv, installs .[cpu], teaches a small ERNIE-4.5-VL to read handwritten digits
# (examples/digits), and prints what it knew before and after. Run it again after a stop: it goes on where it was.
# usage: bash launch/quickstart.sh [setting=value ...]        PYTHON=python3.12 bash launch/quickstart.sh output_dir=output/mine
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
  echo "$python must be Python 3.10 to 3.13; set another one: PYTHON=python3.12 bash launch/quickstart.sh" >&2
  exit 1
}
started=$SECONDS
[ -x .venv/bin/pip ] || "$python" -m venv .venv
stamp=.venv/.installed-cpu
if [ ! -f "$stamp" ] || [ setup.py -nt "$stamp" ]; then
  echo "installing into .venv: about 900 MB, once"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[cpu]"
  touch "$stamp"
fi
installed=$SECONDS
.venv/bin/ernie-tune train examples/digits/sft.yaml "$@"
.venv/bin/python - $((installed - started)) $((SECONDS - installed)) "$@" <<'EOF'
import json
import sys
from pathlib import Path

from ernie_tune.config.loader import load_config, split_overrides

install, train, *settings = sys.argv[1:]
folder = Path(load_config("examples/digits/sft.yaml", split_overrides(settings)[1]).config.save.output_dir)
before = json.loads((folder / "before.json").read_text())["metrics"]
after = json.loads((folder / "eval_results.json").read_text())
print(f"""
Handwritten digits that the model had not seen, read correctly (examples/digits/eval.jsonl)
  before training  {before["eval_exact_match"]:6.1%}
  after training   {after["eval_exact_match"]:6.1%}
installing took {install} s, training and measuring {train} s

every answer, before and after   {folder}/before_after.html
loss curve                       {folder}/training_loss.svg
model card, weights, logs        {folder}/
talk to it                       .venv/bin/ernie-tune chat {folder}        then: /image examples/digits/images/1600.png
your own rows                    README.md, "Your own data"
""")
EOF

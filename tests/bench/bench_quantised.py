"""What quantisation costs a trained model: python tests/bench/bench_quantised.py MODEL CALIB.jsonl
EVAL.jsonl [--rows 512] [--max_new_tokens 8]

Exports MODEL packed with every scheme and method, lets each folder answer EVAL, and prints accuracy
and the output error of experts on held-out rows of EVAL, relative to rounding to nearest. Codes are
the same as in the folders for FastDeploy. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ernie_tune.cli.export import task_score
from ernie_tune.data.processor import Processor
from ernie_tune.export.run import export
from ernie_tune.peft.packed import load_packed

CASES = (
    ("wint8", "rtn", 1),
    ("mix", "clip", 1),
    ("wint4", "rtn", 1),
    ("wint4", "clip", 1),
    ("wint4", "gptq", 1),
    ("wint4", "rtn", 2),
    ("wint4", "clip", 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--max_new_tokens", type=int, default=8)
    a = parser.parse_args()
    score = task_score(a.eval, 10**9, a.max_new_tokens)
    found: list[dict[str, Any]] = []
    print(f"{'':<16}{'accuracy':>10}{'change':>9}{'text/rtn':>10}{'vision/rtn':>11}{'KL':>10}{'perplexity':>12}")
    for quantization, method, tp in CASES:
        with TemporaryDirectory() as place:
            out = Path(place) / "out"
            options: dict[str, Any] = {
                "quantization": quantization,
                "method": method,
                "target_tp": tp,
                "emit": "packed",
            }
            report = export(a.model, out, calib=a.calib, eval=a.eval, calib_rows=a.rows, score=None, **options)
            scores = dict(score(load_packed(out), Processor.from_pretrained(out)))
            if not found:
                before = dict(score(_plain(a.model), Processor.from_pretrained(a.model)))
                print(f"{'bfloat16':<16}{before['accuracy']:>10.2%}")
                found.append({"case": "bfloat16", **before})
        checks = report["checks"]
        errors = checks["layer_errors"]
        ratios = [errors["ours"][f"{m} experts"] / errors["rtn"][f"{m} experts"] for m in ("text", "vision")]
        case = f"{quantization} {method}" + (f" tp{tp}" if tp > 1 else "")
        change = scores["accuracy"] - found[0]["accuracy"]
        print(
            f"{case:<16}{scores['accuracy']:>10.2%}{100 * change:>+9.2f}{ratios[0]:>10.3f}{ratios[1]:>11.3f}"
            f"{checks['ours']['kl']:>10.6f}{checks['ours']['perplexity']:>12.5f}",
            flush=True,
        )
        found.append({"case": case, **scores, "error_over_rtn": ratios, **checks["ours"]})
    print(json.dumps(found))


def _plain(folder: Path) -> Any:
    """The model with its weights rounded to bfloat16, as an export without quantisation has
    them.
    """
    from ernie_tune.export.measure import model_of
    from ernie_tune.export.source import ExportSource, Rounded

    return model_of(Rounded(ExportSource(folder)))


if __name__ == "__main__":
    sys.exit(main())

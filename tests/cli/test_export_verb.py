"""`ernie-tune export`: options and their other names, the score of the task, the command at the
end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.tiny_runs import mixed_rows, write_rows

import ernie_tune
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli.export import shard_bytes
from ernie_tune.cli.main import main
from ernie_tune.data.processor import Processor
from ernie_tune.export import files


@pytest.fixture
def base(tmp_path: Path) -> Path:
    AutoModel.from_config("tiny-a").save_pretrained(tmp_path / "base")
    Processor.bundled("tiny").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_writes_and_prints_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        str(base),
        "--out",
        str(tmp_path / "out"),
        "--precision",
        "wint8",
        "--export_size",
        "1MB",
        "--tp",
        "2",
        "--verify",
        "files",
    ]
    assert main(["quantize", *words]) == 0
    out = capsys.readouterr().out
    assert "every check passed" in out
    assert "note: FastDeploy's kernels need rows in 64s" in out
    assert f"ernie-tune serve {tmp_path / 'out'}" in out, "not the command of a server that cannot"
    assert "fastdeploy.entrypoints" not in out
    assert "of bfloat16 weights" in out
    assert "replaced" not in out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| quantization | wint8, when FastDeploy loads it: the weights here are bfloat16 |" in card
    assert "`ernie-tune serve out` does" in card
    script = (tmp_path / "out" / "serve.sh").read_text(encoding="utf-8")
    assert "--tensor-parallel-size 2" in script
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3


def test_the_card_speaks_of_the_exported_folder() -> None:
    run = "# run\n\n## Use\n\nTalk to it:\n\n```bash\nernie-tune chat run\n```\n\nScore it:\n\n```bash\nernie-tune eval run\n```\n"
    report = {"layout": "packed", "quantization": "wint4", "method": "clip", "target_tp": 1, "adapters": []}
    told = files.card(
        f"{run}\n## Arguments\n\n| a | b |\n", "my out", {**report, "verify": "full", "unservable": []}, "x"
    )
    assert "ernie-tune chat 'my out'" in told
    assert "chat run" not in told
    assert "eval run" not in told
    assert told.index("# run") < told.index("## Use") < told.index("## Arguments") < told.index("## Export")
    assert files.card(
        "# mine\n\n## Use\n\nAs you like.\n", "out", {**report, "verify": "full", "unservable": []}, "x"
    ).count("As you like.")


def test_scores_the_task(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(6))
    words = [
        "export",
        str(base),
        "--output_dir",
        str(tmp_path / "out"),
        "--quantization",
        "wint8",
        "--eval",
        rows,
        "--eval_max_new_tokens",
        "2",
    ]
    assert main(words) == 0
    scores = json.loads((tmp_path / "out" / "export_report.json").read_text())["checks"]["scores"]
    assert set(scores) == {"before", "rtn", "ours"}
    assert "exact_match" in scores["before"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "expected a model folder or an adapter"),
        (["{base}"], 2, "--output_dir must be given"),
        (["{base}", "--output_dir", "x", "--bits", "4"], 2, "unknown option 'bits'; export takes output_dir"),
        (["{base}", "--output_dir", "x", "--target_tp", "two"], 2, "target_tp ('two') must be a int"),
        (["{base}", "--output_dir", "x", "--max_shard_size", "5TB"], 2, "max_shard_size ('5TB')"),
        (["{base}", "--output_dir", "{base}"], 1, "must not be one of the folders that are read"),
        (["nowhere", "--output_dir", "x"], 1, "model ('nowhere') must be a folder"),
    ],
)
def test_mistakes(base: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str) -> None:
    assert main(["export", *(word.replace("{base}", str(base)) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_shard_sizes() -> None:
    assert [shard_bytes(t) for t in ("5GB", "1.5mb", "300kb", "12345")] == [5 * 10**9, 1_500_000, 300_000, 12345]


def test_the_package_can_be_called() -> None:
    """The public name is the package's: both import orders give the same thing."""
    from ernie_tune import export
    from ernie_tune.export.run import export as function

    assert ernie_tune.export is export is sys.modules["ernie_tune.export"]
    with pytest.raises(ValueError, match="must be one of"):
        export(".", "x", layout="onnx")  # type: ignore[operator]
    with pytest.raises(ValueError, match="must be one of"):
        function(".", "x", layout="onnx")

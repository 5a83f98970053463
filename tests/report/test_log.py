"""The files and lines of a run: HF's and Paddle's names and formats, kills, resumes, growing
columns.
"""

from __future__ import annotations

import csv
import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.report.log import (
    RunFacts,
    RunLog,
    comparison_table,
    console_line,
    header_lines,
    metrics_table,
    read_log,
    stamp,
)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def make(folder: Path, **options: object) -> tuple[RunLog, list[str]]:
    lines: list[str] = []
    return RunLog(folder, echo=lines.append, **options), lines  # type: ignore[arg-type]


def test_console_line_is_paddles() -> None:
    values = {
        "loss": 4.86592484,
        "learning_rate": 0.00025,
        "interval_runtime": 0.0258,
        "interval_samples_per_second": 77.44784,
        "interval_steps_per_second": 38.7239,
    }
    line = stamp(console_line(3, values, 0.09375), now=datetime(2026, 11, 22, 11, 18, 25, 636_000))
    assert line == (
        "[2026-11-22 11:18:25,636] [    INFO] - loss: 4.8659, learning_rate: 0.00025, global_step: 3, interval_runtime: 0.0258, "
        "interval_samples_per_second: 77.4478, interval_steps_per_second: 38.7239, progress_or_epoch: 0.0938"
    )


def test_console_line_of_an_evaluation() -> None:
    values = {
        "eval_loss": np.float32(0.5),
        "eval_exact_match": 0.75,
        "grad_norm": 2.5e-6,
        "note": "ok",
        "bad": float("nan"),
    }
    assert console_line(10, values, 1) == (
        "global_step: 10, eval_loss: 0.5, eval_exact_match: 0.75, grad_norm: 2.5e-06, note: ok, bad: nan, progress_or_epoch: 1.0"
    )


def test_header_block() -> None:
    lines = header_lines(RunFacts(1000, 3.0, 1, 8, 4, 375, 3000, 1_234_567))
    assert lines == [
        "***** Running training *****",
        "  Num examples = 1,000",
        "  Num Epochs = 3",
        "  Instantaneous batch size per device = 1",
        "  Total train batch size (w. parallel, distributed & accumulation) = 8",
        "  Gradient Accumulation steps = 4",
        "  Total optimization steps = 375",
        "  Total num train samples = 3,000",
        "  Number of trainable parameters = 1,234,567",
    ]


def test_numbers_are_short_and_counts_whole() -> None:
    values = {
        "loss": 3.6611104,
        "eval_dropped_rows": 7.0,
        "learning_rate": 1.23456e-5,
        "tiny": -2.5e-9,
        "zero": -0.00000,
    }
    assert console_line(1, values, 0.5) == (
        "loss: 3.6611, learning_rate: 1.235e-05, global_step: 1, eval_dropped_rows: 7, tiny: -2.5e-09, zero: 0.0, progress_or_epoch: 0.5"
    )


def test_comparison_table_says_what_training_did(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"eval_loss": 2.5, "eval_exact_match": 0.0, "eval_macro_f1": 0.0, "kl": 0.1, "eval_token_acc": 0.25}
    after = {
        "eval_loss": 0.5,
        "eval_exact_match": 0.9375,
        "eval_macro_f1": 0.9375,
        "kl": 0.2,
        "eval_token_acc": 0.25,
        "new": 1.0,
    }
    assert comparison_table("eval", before, after) == [
        "***** eval metrics *****",
        "                    before   after   change",
        "  eval_loss            2.5     0.5  -2.0000  better",
        # macro_f1 says the same and is left out
        "  eval_exact_match     0.0  0.9375  +0.9375  better",
        "  kl                   0.1     0.2  +0.1000",
        "  eval_token_acc      0.25    0.25   0.0000",
        "  new                          1.0",
    ]
    worse = comparison_table("eval", {"eval_loss": 1.0}, {"eval_loss": 1.5})[-1]
    assert worse == "  eval_loss     1.0    1.5  +0.5000  worse"
    before = {"eval_token_acc": 0.0, "eval_exact_match": 0.0, "eval_token_f1": 0.0, "eval_length/chosen": 3.5}
    after = {"eval_token_acc": 1.0, "eval_exact_match": 1.0, "eval_token_f1": 1.0, "eval_length/chosen": 3.5}
    pair = {"eval_length/rejected": 3.5}  # equal by chance: another thing, and told
    for last in (after, before):  # learnt whole, or nothing at all
        shown = [line.split()[0] for line in comparison_table("eval", before | pair, last | pair)[2:]]
        assert shown == ["eval_token_acc", "eval_exact_match", "eval_length/chosen", "eval_length/rejected"]
    assert "eval_token_f1" in comparison_table("eval", {"eval_token_f1": 0.0}, {"eval_token_f1": 1.0})[2]
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    assert comparison_table("eval", {"eval_loss": 1.0}, {"eval_loss": 0.99996})[1:] == [
        "             训练前  训练后    变化",
        "  eval_loss     1.0     1.0  0.0000",
    ]


def test_results_are_shown_beside_what_they_were(tmp_path: Path) -> None:
    log, lines = make(tmp_path)
    log.results("train", {"train_loss": 1.5}, 1.0)
    log.results("eval", {"eval_loss": 0.5}, 1.0, {"eval_loss": 2.0})
    assert [line.partition(" - ")[2] for line in lines[-3:]] == [
        "***** eval metrics *****",
        "             before  after   change",
        "  eval_loss     2.0    0.5  -1.5000  better",
    ]
    assert json.loads((tmp_path / "all_results.json").read_text())["train_loss"] == 1.5


def test_line_of_a_step_holds_no_more_than_a_reader_wants(tmp_path: Path) -> None:
    log, lines = make(tmp_path)
    values = {
        "loss": 1.0,
        "tokens_per_second": 9.0,
        "interval_runtime": 1.0,
        "max_memory_gib": 2.0,
        "remaining_time": 3.0,
    }
    log.log(1, values, 0.5)
    log.log(2, values, 1.0, silent=True)
    assert [line.partition(" - ")[2] for line in lines] == [
        "loss: 1.0, global_step: 1, tokens_per_second: 9.0, progress_or_epoch: 0.5"
    ]
    assert [set(values) < set(r) for r in read_log(tmp_path / "trainer_log.jsonl")[0]] == [True, True]


def test_metrics_table() -> None:
    assert metrics_table("train", {"train_loss": 0.25, "epoch": 3.0}) == [
        "***** train metrics *****",
        "  epoch      =  3.0",
        "  train_loss = 0.25",
    ]


def test_every_record_reaches_the_files_at_once(tmp_path: Path) -> None:
    log, lines = make(tmp_path)
    log.log(1, {"loss": np.float32(2.5), "learning_rate": 1e-4}, 0.25)
    log.log(2, {"loss": float("nan"), "learning_rate": 5e-5}, 0.5)
    log.log(2, {"eval_loss": 2.0, "eval_label": "是", "eval_classes": {"cat": 0.5}}, 0.5)
    want = [
        {"epoch": 0.25, "step": 1, "loss": 2.5, "learning_rate": 1e-4},
        {"epoch": 0.5, "step": 2, "loss": None, "learning_rate": 5e-5},
        {"epoch": 0.5, "step": 2, "eval_loss": 2.0, "eval_label": "是", "eval_classes": {"cat": 0.5}},
    ]
    assert [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()] == want
    assert log.history == want
    table = rows(tmp_path / "metrics.csv")
    assert list(table[0]) == ["step", "epoch", "loss", "learning_rate", "eval_loss", "eval_label"]
    assert [row["loss"] for row in table] == ["2.5", "", ""]
    assert [row["eval_loss"] for row in table] == ["", "", "2.0"]
    assert len(lines) == 3
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[    INFO\] - loss: 2.5, .*", lines[0])
    assert "loss: nan, learning_rate: 5e-05, global_step: 2" in lines[1]


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    log.log(1, {"loss": 3.0}, 0.1)
    log.log(2, {"loss": 2.0}, 0.2)
    path = tmp_path / "trainer_log.jsonl"
    path.write_bytes(path.read_bytes() + '{"epoch": 0.3, "step": 3, "标'.encode()[:-1])
    again, _ = make(tmp_path, resume_step=3)
    again.log(3, {"loss": 1.0}, 0.3)
    history, size = read_log(path)
    assert [r["loss"] for r in history] == [3.0, 2.0, 1.0]
    assert size == path.stat().st_size


def test_a_broken_line_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trainer_log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"trainer_log.jsonl:2: .* must be one JSON record"):
        read_log(path)


def test_resume_leaves_no_duplicates(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    for step in range(1, 8):
        log.log(step, {"loss": 10.0 - step}, step / 10)
    resumed, _ = make(tmp_path, resume_step=5)
    for step in range(6, 11):
        resumed.log(step, {"loss": 10.0 - step, "grad_norm": 1.0}, step / 10)
    assert [r["step"] for r in read_log(tmp_path / "trainer_log.jsonl")[0]] == list(range(1, 11))
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == [str(n) for n in range(1, 11)]
    assert [r["step"] for r in resumed.state(10, 1.0)["log_history"]] == list(range(1, 11))


def test_resume_in_another_folder_takes_the_checkpoints_history(tmp_path: Path) -> None:
    history = [{"epoch": 0.1, "step": 1, "loss": 2.0}, {"epoch": 0.2, "step": 2, "loss": 1.0}]
    log, _ = make(tmp_path / "new", resume_step=1, history=history)
    assert log.history == history[:1]
    assert read_log(tmp_path / "new" / "trainer_log.jsonl")[0] == history[:1]


def test_a_new_run_keeps_the_earlier_log(tmp_path: Path) -> None:
    for loss in (3.0, 2.0, 1.0):
        log, lines = make(tmp_path)
        log.log(1, {"loss": loss}, 0.1)
    assert [read_log(tmp_path / f"trainer_log{n}.jsonl")[0][0]["loss"] for n in (".1", ".2", "")] == [3.0, 2.0, 1.0]
    assert "kept as trainer_log.2.jsonl" in lines[0]
    assert len(rows(tmp_path / "metrics.csv")) == 1


def test_state_has_hf_names(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    log.log(4, {"loss": 1.0}, 0.5)
    log.write_state(4, 0.5, max_steps=8, best_metric=np.float64(0.9), best_model_checkpoint=tmp_path / "checkpoint-4")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["log_history"] == [{"epoch": 0.5, "step": 4, "loss": 1.0}]
    assert (state["global_step"], state["epoch"], state["max_steps"], state["best_metric"]) == (4, 0.5, 8, 0.9)
    assert state["best_model_checkpoint"].endswith("checkpoint-4")
    # what transformers' trainer_state.json holds
    names = "best_metric best_model_checkpoint consumed_samples epoch global_step is_local_process_zero is_world_process_zero "
    names += "log_history max_steps num_train_epochs total_flos trial_name trial_params"
    assert set(names.split(" ")) <= set(state)
    with pytest.raises(ValueError, match=r"field \(stepz\) must be one of"):
        log.state(4, 0.5, stepz=1)


def test_results(tmp_path: Path) -> None:
    log, lines = make(tmp_path)
    log.results("train", {"train_loss": 0.5, "train_runtime": 12.0}, 3)
    log.results("eval", {"eval_loss": float("inf")}, 3)
    read = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("*_results.json")}
    epoch = {"epoch": 3.0, "progress_or_epoch": 3.0}
    assert read["train_results.json"] == {**epoch, "train_loss": 0.5, "train_runtime": 12.0}
    assert read["eval_results.json"] == {**epoch, "eval_loss": None}
    assert read["all_results.json"] == {**epoch, "train_loss": 0.5, "train_runtime": 12.0, "eval_loss": None}
    assert [line.split(" - ")[1] for line in lines if "*****" in line] == [
        "***** train metrics *****",
        "***** eval metrics *****",
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", is_main=False)
    log.header(RunFacts(1, 1, 1, 1, 1, 1, 1, 1))
    log.log(1, {"loss": 1.0}, 0.1)
    log.results("train", {}, 1)
    log.write_state(1, 0.1)
    assert log.history == [{"epoch": 0.1, "step": 1, "loss": 1.0}]
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_header_is_printed(tmp_path: Path) -> None:
    log, lines = make(tmp_path)
    log.header(RunFacts(1000, 3.0, 1, 8, 4, 375, 3000, 5))
    assert lines[0].endswith(" [    INFO] - ***** Running training *****")
    assert len(lines) == 9


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    log, _ = make(tmp_path)
    with pytest.raises(
        ValueError, match=r"logged value \(array.* must be a number, text, list or mapping, not ndarray"
    ):
        log.log(1, {"loss": np.zeros(2)}, 0.1)
    assert log.history == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_of_once_and_what_was_missed_is_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog(tmp_path, echo=said.append)
    log.log(1, {"loss": 1.0}, 0.1)
    for name in ("trainer_log.jsonl", "metrics.csv"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/full")
        (tmp_path / f"{name}.tmp").mkdir()  # nor can it be written anew
    for step in (2, 3, 4):
        log.log(step, {"loss": 1.0}, 0.1)
    told = [line for line in said if "WARNING" in line]
    assert [
        f"{tmp_path}/{n} cannot be written (" in line
        for n, line in zip(("trainer_log.jsonl", "metrics.csv"), told, strict=True)
    ] == [True, True]
    for name in ("trainer_log.jsonl", "metrics.csv"):
        (tmp_path / f"{name}.tmp").rmdir()
    log.log(5, {"loss": 1.0}, 0.1)
    assert [r["step"] for r in read_log(tmp_path / "trainer_log.jsonl")[0]] == [1, 2, 3, 4, 5]
    assert len((tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()) == 6
    log.log(6, {"loss": 1.0}, 0.1)
    assert len((tmp_path / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_a_file_that_cannot_be_replaced_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ernie_tune.report.log.os.replace", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "a.json", "{}")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []

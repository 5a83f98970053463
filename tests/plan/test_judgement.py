"""What every verb asks before a run: files, recipes that make them, models of other families,
layouts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie_tune.cli import main
from ernie_tune.config.loader import load_config
from ernie_tune.plan.judgement import judged, recipe_that_makes

ROW = '{"prompt": "a", "response": "b"}\n'
BASE = "model_name_or_path: tiny-a\ntrain_dataset_path: x.jsonl\nmax_steps: 2\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(ROW)
    return tmp_path


def refusal(text: str, *, training: bool = True) -> str:
    Path("run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^run\.yaml:") as caught:
        judged(load_config("run.yaml", environ={}), "run.yaml:1", training=training)
    return str(caught.value)


def notes(text: str) -> str:
    Path("run.yaml").write_text(text)
    return "\n".join(judged(load_config("run.yaml", environ={}), "run.yaml:1", training=False))


def test_what_is_there_is_silent(here: Path) -> None:
    (here / "dataset_info.json").write_text('{"mine": {"file_name": "x.jsonl"}}')
    for path in ("x.jsonl", "x.jsonl#5", "*.jsonl", ".", "mine", "mine#3", "x.jsonl,mine"):
        assert notes(BASE.replace("x.jsonl", f'"{path}"')) == ""


@pytest.mark.parametrize(
    ("line", "setting", "words"),
    [
        ("train_dataset_path: gone.jsonl", "train_dataset_path", "(gone.jsonl) is not there, seen from"),
        ("train_dataset_path: 'gone{}{x}.jsonl'", "train_dataset_path", "(gone{}{x}.jsonl) is not there"),
        ("eval_dataset_path: gone.jsonl#7", "eval_dataset_path", "(gone.jsonl) is not there"),
        ("guard_set: gone.jsonl\neval_strategy: epoch", "guard_dataset_path", "(gone.jsonl) is not there"),
        ("model: ./gone", "model_name_or_path", "(./gone) is not there"),
        ("model: gone", "model_name_or_path", "(gone) is not there"),
        ("adapters: ./gone", "lora_path", "(./gone) is not there"),
        ("resume_from_checkpoint: out/checkpoint-5", "resume_from_checkpoint", "(out/checkpoint-5) is not there"),
        ("output_dir: x.jsonl", "output_dir", "(x.jsonl) must be a folder, and "),
        ("output_dir: x.jsonl/run", "output_dir", "(x.jsonl/run) must be a folder, and "),
        ('output_dir: ""', "output_dir", "must name a folder"),
        ("freeze_spec: gone.json", "freeze_spec", "(gone.json) is not there"),
        ("reward_model: out/reward\nstage: PPO", "reward_model", "(out/reward) is not there"),
        ("value_model: out/reward\nstage: PPO", "value_model", "(out/reward) is not there"),
        ("teacher_model: out/teacher\nstage: RLVR", "teacher_model", "(out/teacher) is not there"),
        ("reward_funcs: exact,gone.py:good\nstage: RLVR", "reward_funcs", "(gone.py) is not there"),
    ],
)  # fmt: skip
def test_what_is_not_there(here: Path, line: str, setting: str, words: str) -> None:
    name = line.partition(":")[0]
    kept = [old for old in BASE.splitlines() if not old.startswith((name, setting))]
    text = "\n".join([*kept, line]) + "\n"
    number = text[: text.index(line)].count("\n") + 1
    assert f"run.yaml:{number}: {setting} {words}" in refusal(text)
    # a file may come later: validate goes on
    assert f"run.yaml:{number}: {setting} {words}" in notes(text)


def test_what_nothing_will_be_measured_by_is_noted(here: Path) -> None:
    text = BASE + "stage: RLVR\nreward_funcs: exact\nnum_generations_eval: 4\n"
    assert "run.yaml:6: num_generations_eval (4) has no effect without held-out rows" in notes(text)
    assert notes(text + "val_size: 1\n") == notes(text + "eval_dataset_path: x.jsonl\n") == ""


def test_loggers_need_their_packages(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "visualdl" else None)
    text = BASE + "report_to: visualdl, swanlab\n"
    wanted = "report_to (swanlab) needs the package swanlab; pip install swanlab"
    assert wanted in refusal(text)
    assert wanted in notes(text)
    assert "visualdl" not in notes(text)
    assert notes(BASE + "report_to: all\n") == ""


def test_the_recipe_that_makes_a_model_is_named(here: Path) -> None:
    recipes = here / "recipes"
    recipes.mkdir()
    (recipes / "sft.yaml").write_text(BASE + "output_dir: output/sft  # here\n")
    (recipes / "dpo.yaml").write_text("model: output/sft\ntrain_dataset_path: x.jsonl\nstage: DPO\n")
    loaded = load_config(recipes / "dpo.yaml", environ={})
    wanted = f"it is made by `ernie-tune train {recipes / 'sft.yaml'}`; run that first"
    with pytest.raises(ValueError, match="made by") as caught:
        judged(loaded, f"{recipes / 'dpo.yaml'}:1", training=True)
    assert wanted in str(caught.value)
    assert recipe_that_makes("output/sft/checkpoint-5", recipes) == recipes / "sft.yaml"
    assert recipe_that_makes("output/sft2", recipes) is None
    assert recipe_that_makes("output", recipes) is None


def test_remedies(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "y.jsonl").write_text(ROW)
    file = here / "sub" / "run.yaml"
    file.write_text(BASE.replace("x.jsonl", "y.jsonl"))
    note = "\n".join(judged(load_config(file, environ={}), f"{file}:1", training=False))
    assert f"seen from {here / 'sub'} there is one: go there, or write {here / 'sub' / 'y.jsonl'}" in note
    # written from the top of a repository, run from elsewhere
    (here / "sub" / "deep").mkdir()
    file = here / "sub" / "deep" / "run.yaml"
    file.write_text(BASE.replace("x.jsonl", "sub/y.jsonl").replace("tiny-a", "sub"))
    monkeypatch.chdir(here / "sub")
    note = "\n".join(judged(load_config(file, environ={}), f"{file}:1", training=False))
    assert f"train_dataset_path (sub/y.jsonl) is not there, seen from {here / 'sub'}: seen from {here} there is" in note
    monkeypatch.chdir(here)
    (here / "dataset_info.json").write_text('{"mine": {"file_name": "x.jsonl"}}')
    assert "dataset_info.json names mine; correct it" in notes(BASE.replace("x.jsonl", "theirs"))


def test_a_released_model_that_is_not_there_can_be_fetched(here: Path) -> None:
    note = notes(BASE.replace("tiny-a", "./ERNIE-4.5-VL-28B-A3B-Paddle"))
    assert (
        "put the weights there, or set model_name_or_path: baidu/ERNIE-4.5-VL-28B-A3B-Paddle and download_hub:" in note
    )


def test_other_families_are_refused_by_all(here: Path) -> None:
    text = BASE.replace("tiny-a", "Qwen/Qwen2-VL-7B-Instruct")
    for training in (True, False):
        assert "model_name_or_path (Qwen/Qwen2-VL-7B-Instruct) must be an ERNIE 4.5 model" in refusal(
            text, training=training
        )
    hub = notes(BASE.replace("tiny-a", "me/my-ernie"))
    assert "(me/my-ernie) is no folder here; unless a hub's cache has it, set download_hub: huggingface" in hub
    assert "degrees of parallelism were not checked" in hub
    assert "is fetched from modelscope" in notes(BASE.replace("tiny-a", "me/my-ernie\ndownload_hub: modelscope"))


def test_templates_of_others_are_noted_and_mistyped_ones_refused(here: Path) -> None:
    Path("run.yaml").write_text(BASE + "template: qwen2_vl\n")
    loaded = load_config("run.yaml", environ={})
    assert loaded.config.data.template == "auto"
    assert loaded.notes[0].startswith("run.yaml:4: template (qwen2_vl) belongs to another model and is not used")
    Path("run.yaml").write_text(BASE + "template: ernie_vll\n")
    with pytest.raises(
        ValueError, match=r"run.yaml:4: template \(ernie_vll\) must be one of .*did you mean 'ernie_vl'"
    ):
        load_config("run.yaml", environ={})


def test_layouts_are_judged_where_the_shape_is_known(here: Path) -> None:
    assert "tensor_model_parallel_size (4) must divide num_attention_heads (6)" in refusal(
        BASE + "tensor_parallel_degree: 4\n"
    )


@pytest.mark.parametrize("verb", ["validate", "train"])
def test_verbs_say_the_same(here: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in (
        ("stage: PPO\npacking: true", "packing (true) must be false at stage PPO"),
        ("stage: DPO\nloss_type: nonsense", "loss_type (nonsense) must be one of"),
        ("stage: KTO\nbatch_size: 1", "per_device_train_batch_size (1) must be at least 2 at stage KTO"),
        ("model: Qwen/Qwen2-VL-7B-Instruct", "must be an ERNIE 4.5 model"),
        ("fp16: true", "fp16 (true) has no effect in this version"),
    ):
        text = BASE.replace("model_name_or_path: tiny-a\n", "") if line.startswith("model") else BASE
        Path("run.yaml").write_text(text + line + "\n")
        assert main.main([verb, "run.yaml"]) == 1
        assert words in capsys.readouterr().err


def test_estimate_and_data_check_tell_what_cannot_be_trained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(BASE + "fp16: true\ndataloader_num_workers: 4\nmax_seq_len: 64\n")
    assert main.main(["estimate", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert "fp16 (true) has no effect in this version" in out
    assert "dataloader_num_workers (4) has no effect" in out
    main.main(["data", "check", "run.yaml"])
    assert "fp16 (true) has no effect in this version" in capsys.readouterr().err

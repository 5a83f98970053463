"""The command line from outside: exit codes, messages, files written, and that none of it loads
paddle.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ernie_tune import __version__
from ernie_tune.cli import doctor, main, verbs
from ernie_tune.cli.verbs import VERBS, Verb
from ernie_tune.config.arguments import SETTINGS
from ernie_tune.config.loader import load_config
from ernie_tune.data.sources import load_dataset

PACKAGE = Path(main.__file__).parents[1]
YAML = "model: tiny-a\ndataset: a.jsonl\nlearning_rate: 3e-4\ndo_train: true\n"


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, encoding="utf-8", cwd=cwd, env=environ, timeout=120
    )


def test_no_verb_loads_paddle(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    code = (
        "import sys; from ernie_tune.cli.main import main\n"
        "for args in ([], ['--help'], ['version'], ['help', 'lr'], ['validate', 'run.yaml'], ['init', 'new'], ['doctor'], ['init', '-h']):\n"
        "    assert main(args) == 0, args\n"
        "print(sorted(m for m in ('paddle', 'numpy', 'torch') if m in sys.modules))"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_and_launcher_find_the_package(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("raise SystemExit('shadowed')")
    for args in (["-m", "ernie_tune"], [str(PACKAGE / "launcher.py")]):
        done = python(*args, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"ernie-tune {__version__}\n"), done.stderr
    code = (
        "import importlib.util, runpy, sys; folder, sys.argv = sys.argv[1], ['launcher.py', 'version']; sys.path[0] = folder\n"
        "try: runpy.run_path(folder + '/launcher.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, folder in sys.path, importlib.util.find_spec('models'))"
    )
    done = python("-c", code, str(PACKAGE), cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0 False None", done.stderr


def test_nothing_beside_the_launcher_hides_the_standard_library() -> None:
    assert not {path.stem for path in PACKAGE.iterdir()} & set(sys.stdlib_module_names)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(verb.help in out for verb in VERBS)
    assert call(capsys) == (0, out, "") == call(capsys, "help")
    for verb in VERBS:
        code, out, _ = call(capsys, verb.name, "-h")
        assert code == 0
        assert out.startswith(f"ernie-tune {verb.name}")
        assert call(capsys, "help", *verb.aliases[:1] or [verb.name])[1] == out
    code, out, _ = call(capsys, "help", "gradient-checkpointing")
    assert code == 0
    assert out.splitlines() == [
        "recompute: recompute activations in the backward pass",
        "section: compute",
        "default: false",
        "true | false",
        "does not change the loss or the trained weights",
        "also written: activation_checkpointing, enable_activation_checkpointing, use_recompute, gradient_checkpointing",
        "also set by: disable_gradient_checkpointing",
    ]
    assert "one of: no, steps, epoch" in call(capsys, "help", "eval_strategy")[1]


def test_every_verb_can_be_loaded_and_every_word_is_used_once() -> None:
    words = [word for verb in VERBS for word in (verb.name, *verb.aliases)]
    assert len(words) == len(set(words))
    assert not set(words) & set(SETTINGS)
    assert all(callable(verb.load()) for verb in VERBS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["valdate"], "unknown verb 'valdate'; did you mean 'validate'?"),
        (["help", "learning_rte"], "no verb or setting is named 'learning_rte'; did you mean 'learning_rate'?"),
        (["validate"], "expected one YAML file, got 0: nothing"),
        (["validate", "a", "b"], "expected one YAML file, got 2: a b"),
        (["init", "a", "b"], "expected one folder, got 2: a b"),
        (["doctor", "now"], "doctor takes no words, got 'now'"),
        (["help", "predit"], "no verb or setting is named 'predit'; did you mean 'predict'?"),
        (["help", "exprot"], "no verb or setting is named 'exprot'; did you mean 'export'?"),
        (["help", "SFTT"], "no verb or setting is named 'SFTT'; did you mean 'sft'?"),
        (["help", "lerning_rate"], "no verb or setting is named 'lerning_rate'; did you mean 'learning_rate'?"),
        (["help", "zzz"], "no verb or setting is named 'zzz'; `ernie-tune help` lists"),
    ],
)
def test_wrong_command_lines(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_wrong_settings_and_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.yaml").touch()
    for verb in ("train", "eval", "validate"):
        code, out, err = call(capsys, verb, "nowhere")
        assert (code, out) == (1, "")
        assert err.startswith(
            f"nowhere is not there, seen from {tmp_path}; give a YAML file or the output_dir of a run"
        )
    assert "; did you mean 'runs.yaml'?" in call(capsys, "validate", "run.yaml")[2]
    with monkeypatch.context() as patch:
        patch.setenv("ERNIE_TUNE_LANG", "zh")
        assert call(capsys, "eval", "nowhere")[2].startswith(
            f"没有 nowhere（当前文件夹为 {tmp_path}）；请给出 YAML 文件"
        )
    file.write_text(YAML + "lerning_rate: 3\n")
    code, out, err = call(capsys, "validate", file)
    assert (code, out) == (1, "")
    assert err.startswith(f"{file}:5: unknown key 'lerning_rate'; did you mean 'learning_rate'?")
    with pytest.raises(ValueError, match="lerning_rate"):
        main.main(["validate", str(file), "--debug"])


def test_other_endings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> int:
        def verb(args: list[str]) -> int:
            raise error

        monkeypatch.setattr(main, "find_verb", lambda word: Verb("x", "", ""))
        monkeypatch.setattr(Verb, "load", lambda self: verb)
        return main.main(["x"])

    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert raising(OSError("no name")) == 1
    assert capsys.readouterr().err == "no name\n"
    with pytest.raises(RuntimeError):  # what is our own mistake keeps its traceback
        raising(RuntimeError())


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environ = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ernie_tune", "help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environ,
        cwd=tmp_path,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b""), errno.errorcode


def test_validate_says_what_and_where_and_replays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    file.write_text(YAML)
    code, out, err = call(capsys, "validate", file, "--lora_rank", "4")
    assert (code, err) == (0, "")
    where = {line.partition(":")[0]: line.partition("# ")[2] for line in out.splitlines()}
    assert where["learning_rate"] == f"{file}:3"
    assert where["model_name_or_path"] == f"{file}:1 as model"
    assert where["lora_rank"] == "command line"
    assert where["seed"] == ""
    assert f"# note: {file}:4: do_train is not used here" in out
    assert out.endswith("is valid, but cannot run yet: 1 thing named above must be there first\n"), "a.jsonl"
    again.write_text(out, encoding="utf-8")
    assert load_config(again, for_training=True).config.lora.lora_rank == 4


@pytest.mark.parametrize("stage", ["SFT", "dpo", "KTO", "UPO", "RM"])
@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_init(stage: str, method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = call(
        capsys, "init", tmp_path / "new", f"stage={stage}", "--fine_tuning", method, "model=tiny-a", "adam_beta1=0.8"
    )
    assert (code, err) == (0, "")
    assert "note" not in out
    file, rows = tmp_path / "new" / "run.yaml", tmp_path / "new" / "data" / "train.jsonl"
    text = file.read_text(encoding="utf-8")
    assert all("  # " in line for line in text.splitlines() if not line.startswith("#"))
    plain = yaml.safe_load(text)
    assert plain["adam_beta1"] == 0.8
    assert ("lora_rank" in plain) == (method == "LoRA")
    assert ("beta" in plain) == (stage not in ("SFT", "RM"))
    assert len(load_dataset(str(rows))) >= 3
    loaded = load_config(file, for_training=True, environ={})
    assert loaded.notes == ()
    assert loaded.config.data.train_dataset_path == (rows.as_posix(),)
    assert (loaded.config.model.stage, loaded.config.model.model_name_or_path) == (stage.upper(), "tiny-a")
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with Image.open(rows.parent / row["images"][0]) as picture:
            assert picture.size == (56, 56)
        assert json.dumps(row).count("<image>") == len(row["images"])
    assert not list(tmp_path.rglob("*.tmp"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = call(capsys, "init", tmp_path / "new", f"stage={stage}")
    assert code == 1
    assert "exists and init overwrites nothing" in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_init_with_own_data_and_other_stages(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = call(capsys, "init", tmp_path / "kto", "stage=PPOO")
    assert code == 1
    assert err.startswith("command line: stage ('PPOO') must be one of SFT")
    assert not (tmp_path / "kto").exists()
    code, out, _ = call(
        capsys, "init", tmp_path / "kto", "stage=KTO", "train_dataset_path=my.jsonl", "num_generations=2"
    )
    assert code == 0
    assert "note: command line: num_generations has no effect with stage KTO" in out
    assert [path.name for path in (tmp_path / "kto").iterdir()] == ["run.yaml"]


def test_doctor_describes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "very secret")
    monkeypatch.delenv("AISTUDIO_ACCESS_TOKEN", raising=False)
    monkeypatch.setenv("MASTER_PORT", "-5")
    code, out, _ = call(capsys, "env")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert code == 0
    assert "secret" not in out
    assert (lines["token for Hugging Face"], lines["token for AI Studio"]) == ("yes", "no")
    assert lines["ernie-tune"] == __version__
    assert "numpy " in lines["packages"]
    assert lines["port on 127.0.0.1"].startswith("cannot bind -5")
    assert "to mend" in lines
    (tmp_path / ".modelscope").mkdir()
    (tmp_path / ".modelscope" / "credentials").touch()
    assert "token for ModelScope: yes" in call(capsys, "doctor")[1]


GOOD = dict.fromkeys(doctor._CORE, "9.9")
MENDING = [
    ({**GOOD, "paddlepaddle": "3.3.1"}, [], {}, None, None),
    ({**GOOD, "paddlepaddle-gpu": "3.10.0"}, ["A800"], {"CUDA_VISIBLE_DEVICES": "0"}, 2**34, None),
    (GOOD, [], {}, None, "paddle is missing"),
    ({"paddlepaddle": "3.3.1"}, [], {}, None, "pip install numpy safetensors"),
    ({**GOOD, "paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.0"}, ["A800"], {}, None, "overwrite each other"),
    ({**GOOD, "paddlepaddle": "2.6.2"}, [], {}, None, "paddlepaddle 2.6.2 is too old"),
    ({**GOOD, "paddlepaddle-gpu": "3.3.0"}, [], {}, None, "nvidia-smi shows no card"),
    ({**GOOD, "paddlepaddle": "3.3.1"}, ["A800"], {}, None, "install paddlepaddle-gpu instead"),
    ({**GOOD, "paddlepaddle": "3.3.1"}, [], {"CUDA_VISIBLE_DEVICES": ""}, None, "unset it"),
    ({**GOOD, "paddlepaddle": "3.3.1"}, [], {}, 2**26, "shared memory is small (0.1 GiB)"),
]


@pytest.mark.parametrize(("versions", "cards", "environ", "shared", "want"), MENDING)
def test_doctor_diagnoses(
    versions: dict[str, str], cards: list[str], environ: dict[str, str], shared: int | None, want: str | None
) -> None:
    found = doctor.diagnose(versions, cards, environ, shared)
    assert found == [] if want is None else [want in line for line in found] == [True]


def test_doctor_reads_cards_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A800-SXM4-80GB, 81920 MiB, 8.0, 535.1'\necho\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert doctor._cards() == ["NVIDIA A800-SXM4-80GB, 81920 MiB, 8.0, 535.1"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._cards() == []
    (tmp_path / "meminfo").write_text("MemTotal:       33554432 kB\nMemFree: 1 kB\nMemAvailable:   16777216 kB\n")
    assert doctor._memory(tmp_path, tmp_path) == "16.0 GiB free of 32.0 GiB"
    for name, text in (("memory.max", "8589934592"), ("memory.current", "0")):
        (tmp_path / name).write_text(text)
    assert doctor._memory(tmp_path, tmp_path) == "16.0 GiB free of 32.0 GiB, container limit 8.0 GiB"
    assert doctor._memory(tmp_path / "absent") == "unknown"


def test_file_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").touch()
    path, entries = verbs.file_and_settings(["--seed", "1", "run.yaml", "lr=2"])
    assert path == "run.yaml"
    assert [(e.name, e.raw) for e in entries] == [("seed", "1"), ("lr", "2")]

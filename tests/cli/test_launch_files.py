"""launch/: the scripts start what they say with the variables they name, the recipes need the
memory they state, the table is the code's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from ernie_tune.cli.main import main
from ernie_tune.config.loader import load_config
from ernie_tune.plan.estimate import estimate
from ernie_tune.plan.table import PUBLISHED, jobs, markdown

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
BIG = sorted([*(ROOT / "examples" / "28b").glob("*_*x80g.yaml"), *(ROOT / "examples" / "424b").glob("*.yaml")])
# Stands in for python: validates for real, and writes down what it would have launched.
FAKE = """#!/usr/bin/env bash
if [ "$2" = ernie_tune ]; then exec {python} "$@"; fi
printf '%s\\n' "$@" > {folder}/words
env > {folder}/env
"""
FILE = "model: tiny-a\ndataset: a.jsonl\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a fake interpreter, two fake cards and a YAML file."""
    import sys

    tools = {
        "python": FAKE.format(python=sys.executable, folder=tmp_path),
        "nvidia-smi": "#!/bin/sh\necho 'GPU 0: x'\necho 'GPU 1: x'\n",
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path


def start(script: str, place: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("NNODES", "RANK", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT")
    }
    variables = {**kept, "PATH": f"{place}:{os.environ['PATH']}", "PYTHON": str(place / "python"), **environ}
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=place, timeout=60)


def launched(place: Path) -> tuple[list[str], dict[str, str]]:
    words = (place / "words").read_text().splitlines()
    lines = (line.partition("=") for line in (place / "env").read_text().splitlines())
    return words, {name: value for name, _, value in lines}


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "set -euo pipefail" in text
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_one_machine(place: Path) -> None:
    done = start("local.sh", place, "run.yaml", "max_steps=3", NNODES="4", ERNIEKIT_DIST_LOG="logs")
    assert done.returncode == 0, done.stderr
    words, environ = launched(place)
    assert words[:5] == ["-u", "-W", "ignore:No ccache found", "-m", "paddle.distributed.launch"]
    assert option(words, "--gpus") == "0,1"
    assert option(words, "--log_dir") == "logs"
    assert "--nnodes" not in words, "local means this machine"
    assert words[-4:] == [str(ROOT / "ernie_tune" / "launcher.py"), "train", "run.yaml", "max_steps=3"]
    assert environ["PYTHONPATH"].split(":")[0] == str(ROOT)


def test_some_cards_and_several_machines(place: Path) -> None:
    environ = {
        "NNODES": "2",
        "RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "777",
        "CUDA_VISIBLE_DEVICES": "3,5",
    }
    done = start("node.sh", place, "run.yaml", VERB="eval", **environ)
    assert done.returncode == 0, done.stderr
    words, inside = launched(place)
    assert [option(words, o) for o in ("--gpus", "--nnodes", "--rank", "--master")] == ["3,5", "2", "1", "10.0.0.1:777"]
    assert words[-2:] == ["eval", "run.yaml"]
    assert option(words, "--log_dir") == "output/dist_log/machine-1"
    assert not {"NNODES", "RANK", "MASTER_ADDR", "MASTER_PORT"} & set(inside), (
        "the launcher sets its own for the workers"
    )
    del environ["MASTER_ADDR"]
    done = start("node.sh", place, "run.yaml", **environ)
    assert done.returncode != 0
    assert "need MASTER_ADDR, the address of machine 0" in done.stderr
    done = start("node.sh", place, "run.yaml", NNODES="2", RANK="2", MASTER_ADDR="x")
    assert done.returncode == 2
    assert "RANK (2) must be below NNODES (2)" in done.stderr


def test_cpu(place: Path) -> None:
    done = start("cpu.sh", place, "4", "run.yaml", CUDA_VISIBLE_DEVICES="", NNODES="2")
    assert done.returncode == 0, done.stderr
    words, environ = launched(place)
    assert option(words, "--nproc_per_node") == "4"
    assert not {"CUDA_VISIBLE_DEVICES", "NNODES"} & set(environ), "an empty list makes the launcher fail"
    for args in ((), ("x", "run.yaml"), ("0", "run.yaml")):
        done = start("cpu.sh", place, *args)
        assert (done.returncode, done.stderr.count("usage:")) == (2, 1)


def test_no_cards_and_wrong_settings_start_nothing(place: Path) -> None:
    (place / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    done = start("local.sh", place, "run.yaml")
    assert done.returncode == 1
    assert "no cards here; on a CPU: bash launch/cpu.sh N run.yaml" in done.stderr
    done = start("cpu.sh", place, "4", "run.yaml", "tensor_parallel_degree=4")
    assert done.returncode == 1
    assert "tensor_model_parallel_size (4) must divide num_attention_heads (6)" in done.stderr
    assert not (place / "words").exists()


def test_slurm(place: Path) -> None:
    (place / "scontrol").write_text("#!/bin/sh\necho host-a\necho host-b\n")
    (place / "srun").write_text('#!/usr/bin/env bash\nshift\nexport SLURM_NODEID=1 SLURMD_NODENAME=host-b\nexec "$@"\n')
    for name in ("scontrol", "srun"):
        (place / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "host-[a-b]",
        "SLURM_JOB_ID": "123456",
    }
    done = start("slurm.sh", place, "run.yaml", "max_steps=3", **job)
    assert done.returncode == 0, done.stderr
    words, _ = launched(place)
    assert [option(words, o) for o in ("--nnodes", "--rank", "--master")] == [
        "2",
        "1",
        f"host-a:{20000 + 123456 % 20000}",
    ]
    assert option(words, "--log_dir") == "output/dist_log/host-b"
    assert words[-2:] == ["run.yaml", "max_steps=3"]


def test_kubernetes() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    environ = {e["name"]: e["value"] for e in container["env"]}
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == int(environ["NNODES"])
    name = job["metadata"]["name"]
    assert environ["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in spec["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("path", BIG, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipes_validate_and_state_their_memory(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0
    assert "is valid" in capsys.readouterr().out
    found = estimate(path)
    cards = int(re.search(r"(\d+)x80g", path.name).group(1))
    assert (found.fits, found.plan.layout.world) == (True, cards)
    assert f"# memory: {found.card_gb:.0f} GB a card" in path.read_text()
    readme = (path.parent / "README.md").read_text()
    assert re.search(rf"\({re.escape(path.name)}\).*\| {found.card_gb:.0f} GB \|", readme)
    assert load_config(path).config.parallel.sequence_parallel == (found.plan.layout.tensor > 1)


def test_the_table_is_what_the_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (LAUNCH / "README.md").read_text()
    table = text.split("<!-- table: ernie-tune estimate --table -->\n")[1].split("<!-- end of table -->")[0]
    assert table.strip() == markdown(), "run: ernie-tune estimate --table, and put it into launch/README.md"
    assert main(["estimate", "--table"]) == 0
    assert capsys.readouterr().out.strip() == table.strip()
    assert set(jobs()) == set(PUBLISHED)


def test_every_file_is_explained() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [f.name for f in LAUNCH.iterdir() if f.name != "README.md" and f.name not in text] == []


def test_processes_on_a_cpu_for_real(tmp_path: Path) -> None:
    """As a user does it on examples/digits: what is shown, what is left, and the same command
    again.
    """
    import sys

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "ERNIEKIT_"))}
    small = [
        "per_device_train_batch_size=4",
        "eval_strategy=no",
        "eval_dataset_path=",
        "save_steps=1",
        "logging_steps=1",
    ]
    words = ["examples/digits/fresh.yaml", f"output_dir={tmp_path}/run", "tensor_model_parallel_size=2", *small]

    def run(steps: int) -> list[str]:
        command = ["bash", str(LAUNCH / "cpu.sh"), "2", *words, f"max_steps={steps}"]
        environ = {**kept, "PYTHON": sys.executable, "ERNIEKIT_DIST_LOG": str(tmp_path / "log")}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        for noise in ("LAUNCH INFO", "ccache", "topology.py", "is not in group"):
            assert noise not in done.stdout + done.stderr
        return re.findall(r"loss: .* global_step: (\d+)", done.stdout)

    assert run(2) == ["1", "2"]
    assert run(3) == ["3"], "it goes on, and shows no line of the first run again"
    assert {"model.safetensors", "config.json", "checkpoint-3"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "log" / "workerlog.1").read_text().count("Traceback") == 0


def test_the_dockerfile_names_extras_that_exist_and_runs_a_shell_script_that_parses() -> None:
    """It is never built here: what can be known without building it is."""
    text = (LAUNCH / "Dockerfile").read_text(encoding="utf-8")
    assert "NOT BUILT BY US" in text
    named = {extra for line in re.findall(r"EXTRAS=([\w,]+)", text) for extra in line.split(",")}
    declared = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= declared
    joined = re.sub(r"\\\n", " ", text)
    for command in re.findall(r"^RUN (.*)$", joined, re.MULTILINE):
        assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0, command
    user, made = (
        re.search(r"^USER tuner$", joined, re.MULTILINE),
        re.search(r"mkdir -p /work/output.*chmod 1777 [^&]*/work/output", joined),
    )
    assert user
    assert made
    assert made.start() < user.start(), "a volume takes the owner of what it covers"
    assert '--user "$(id -u):$(id -g)"' in text, "a folder of the host keeps its own"
    assert all(word.split()[0] in {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "CMD"} for word in
               (line for line in joined.splitlines() if line.strip() and not line.startswith("#")))  # fmt: skip

"""config/secrets.py: what is a secret, how workers get theirs, and what is left of the launcher's
files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_tune.config.secrets import clean_launcher_files, is_secret, remove_launcher_files, without_secrets

ROOT = Path(__file__).parents[2]
SECRETS = {
    "HF_TOKEN": "x", "HUGGING_FACE_HUB_TOKEN": "x", "WANDB_API_KEY": "x", "AWS_SECRET_ACCESS_KEY": "x",
    "AISTUDIO_ACCESS_TOKEN": "x", "MODELSCOPE_API_TOKEN": "x", "MYSQL_PWD": "x", "PGPASSWORD": "x", "DB_PASS": "x",
    "GOOGLE_APPLICATION_CREDENTIALS": "x", "REGISTRY_AUTH": "x", "GITHUB_PAT": "x", "QINIU_AK": "x", "SLACK_WEBHOOK": "x",
    "SENTRY_DSN": "x", "ssh_passphrase": "x", "HTTP_PROXY": "http://me:pw@proxy:3128", "PIP_INDEX_URL": "https://u:p@h/simple",
    "DATABASE_URL": "postgres://u:p@h/d", "OTEL_EXPORTER_OTLP_HEADERS": "x", "DOCKER_LOGIN": "x", "AWS_SESSION": "x", "SWANLAB_API": "x",
    # by what they hold
    "GH": "ghp_abcdefghijklmnopqrstuvwxyz01", "LLM": "sk-proj-abcdef0123456789", "HUB": "hf_abcdefghijklmnop", "LAB": "glpat-abcdefgh12",
    "CLOUD": "AKIAIOSFODNN7EXAMPLE", "MAPS": "AIzaSyA1234567890abcdefghijklm", "BEARER": "Bearer abc", "ID_FILE": "-----BEGIN OPENSSH",
    "GIT_CONFIG_PARAMETERS": "'http.extraheader=Authorization: Basic abc'", "FEED_URL": "https://h/s?token=abcdefgh",
    "S3_URL": "https://b.s3/x?X-Amz-Signature=abc", "SLACK_URL": "https://hooks.slack.com/services/T0/B0/x",
    "KAGGLE_JSON": '{"username":"a","key":"abc"}', "DB": "Server=h;Uid=a;Pwd=abc;", "NOTEBOOK": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx.abc",
    "WANDB": "0123456789abcdef0123456789abcdef01234567",
}  # fmt: skip
PLAIN = {
    "PATH": "/bin", "HOME": "/h", "PWD": "/w", "OLDPWD": "/o", "LANG": "C", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0",
    "PADDLE_TRAINER_ID": "0", "PADDLE_TRAINER_ENDPOINTS": "127.0.0.1:1,127.0.0.1:2", "FLAGS_selected_gpus": "0", "POD_NAME": "a",
    "HTTPS_PROXY": "http://proxy:3128", "NCCL_SOCKET_IFNAME": "eth0", "SSL_CERT_FILE": "/c", "PYTHONPATH": "/a", "COMPASS": "n",
    "ERNIE_TUNE_LANG": "en", "MKL_DEBUG_CPU_TYPE": "5", "HF_HOME": "/hf", "LD_LIBRARY_PATH": "/opt/hf_environment/lib:/usr/lib",
    "PADDLE_JOB_ID": "0123456789abcdef0123456789abcdef", "HOSTNAME": "job-7f9c8d5b6c-abcdefghijklmnop1", "CONDA_PREFIX": "/opt/hf_environment",
    "TERM": "xterm-256color", "LS_COLORS": "rs=0:di=01;34:ln=01;36", "NO_PROXY": "localhost,127.0.0.1", "LC_ALL": "zh_CN.UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_secrets(name: str) -> None:
    assert is_secret(name, SECRETS[name])


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_none(name: str) -> None:
    assert not is_secret(name, PLAIN[name])


def test_a_worker_gets_what_its_launcher_was_not_given() -> None:
    code = "import os, subprocess, sys; from ernie_tune.cli.workers import worker_environ as w; "
    code += "subprocess.run([sys.executable, '-c', 'import ernie_tune, os; print(os.environ[\"HF_TOKEN\"], os.environ[\"A_KEY\"])'],"
    code += " env={**w(os.environ), 'A_KEY': 'own'}, check=True); assert 'HF_TOKEN' not in w(os.environ)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "tok", "A_KEY": "parent"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tok", "own"]


def test_the_launchers_files(tmp_path: Path) -> None:
    everything = {**SECRETS, **PLAIN}
    (tmp_path / "backup_env.0.json").write_text(json.dumps(everything))
    (tmp_path / "envlog.0").write_text("HF_TOKEN=x")
    (tmp_path / "default.ab.log").write_text(f"{os.environ!s}"[:20])
    (tmp_path / "workerlog.0").write_text("loss: 1")
    (tmp_path / "mine.log").write_text("mine")
    clean_launcher_files({})
    assert len(list(tmp_path.iterdir())) == 5, "no worker"
    clean_launcher_files({"PADDLE_BACKUP_ENV_PATH": str(tmp_path / "backup_env.0.json")})
    assert json.loads((tmp_path / "backup_env.0.json").read_text()) == PLAIN == without_secrets(everything)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup_env.0.json", "mine.log", "workerlog.0"]
    remove_launcher_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.log", "workerlog.0"]

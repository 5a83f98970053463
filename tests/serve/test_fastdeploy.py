"""`serve --engine fastdeploy`: the command, and a stand-in for FastDeploy that is started, watched
and ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_tune.cli.main import main
from ernie_tune.cli.serve_fastdeploy import fastdeploy_command
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.loader import split_overrides
from ernie_tune.data.chat import ChatTemplate
from ernie_tune.data.processor import Processor
from ernie_tune.data.templates import RELEASED, TRANSFORMERS

OLD = Path(__file__).parents[1] / "golden" / "tokenizer_old"
STAND_IN = """
import argparse, http.server, os, sys, time
flags = argparse.ArgumentParser()
for name in ("model", "port", "engine-worker-queue-port", "metrics-port", "cache-queue-port", "tensor-parallel-size", "quantization",
             "load-choices", "max-model-len", "max-num-seqs", "mm-processor-kwargs", "limit-mm-per-prompt", "reasoning-parser"):
    flags.add_argument("--" + name)
given = flags.parse_args()
if given.quantization == "bad":
    sys.exit(3)
started = time.monotonic()
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = time.monotonic() - started > 1
        self.send_response(200 if ready and self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
if given.quantization == "silent":
    time.sleep(60)
http.server.HTTPServer(("127.0.0.1", int(given.port)), Health).serve_forever()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"vision_config": {}}), encoding="utf-8")
    return made


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which FastDeploy is installed."""
    package = tmp_path / "site" / "fastdeploy" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").write_text("", encoding="utf-8")
    (package / "api_server.py").write_text(STAND_IN, encoding="utf-8")
    paths = [str(tmp_path / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return min(int(sock.getsockname()[1]), 65000)


def start(folder: Path, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ernie_tune", "serve", str(folder), "--engine", "fastdeploy", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_print_shows_the_command_with_ports_that_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed command's flags, its port conflict mended, its no-op left
    out.
    """
    words = ["--tensor_parallel_size", "8", "--quantization", "wint4", "--limit_mm_per_prompt", '{"image": 4}']
    assert main(["serve", "--print", str(folder), "--engine", "fastdeploy", *words]) == 0
    said = capsys.readouterr().out.strip()
    assert said.startswith(f"python -m fastdeploy.entrypoints.openai.api_server --model {folder} --port 8180")
    for part in ("--tensor-parallel-size 8", "--quantization wint4", "--max-model-len 32768", "--max-num-seqs 32"):
        assert part in said
    assert """--mm-processor-kwargs '{"video_max_frames": 30}' --limit-mm-per-prompt '{"image": 4}'""" in said
    assert said.endswith("--reasoning-parser ernie-45-vl")
    assert "--enable-mm" not in said
    ports = [
        said.split(f"{flag} ")[1].split()[0]
        for flag in ("--port", "--engine-worker-queue-port", "--metrics-port", "--cache-queue-port")
    ]
    assert len(set(ports)) == 4


def test_the_folders_limits_are_passed_and_the_command_line_wins(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FastDeploy does not read them in the folder."""
    settings = {"min_pixels": 3136, "max_pixels": 12544, "fps": 1.5, "max_frames": 32, "frames_sample": "leading"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    command, *_ = fastdeploy_command(
        str(folder), split_overrides(["--mm_processor_kwargs", '{"video_max_frames": 20}'])[1]
    )
    assert command.mm_processor == {
        "image_min_pixels": 3136,
        "image_max_pixels": 12544,
        "video_min_pixels": 234416,
        "video_max_pixels": 937664,
        "video_min_frames": 16,
        "video_max_frames": 20,
        "video_fps": 2,
        "video_frames_sample": "leading",
    }
    assert "whole frames a second only: clips are sampled at 2, here at 1.5" in capsys.readouterr().err


def test_a_folder_that_would_lose_pictures_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Output of earlier versions, served before it is exported."""
    processor = Processor.from_pretrained(OLD)
    processor.sees = True
    processor.save_pretrained(folder)
    fastdeploy_command(str(folder), [])
    assert "can never generate" in capsys.readouterr().err
    processor.save_pretrained(folder, TRANSFORMERS)
    with pytest.raises(ValueError, match=r"must hold <\|image@placeholder\|>: FastDeploy would drop every picture"):
        fastdeploy_command(str(folder), [])
    for name, text in {
        "chat_template.jinja": ChatTemplate().to_jinja(RELEASED.image, TRANSFORMERS.video),
        "chat_template.json": json.dumps({"chat_template": ChatTemplate().to_jinja(RELEASED.image, "<|v|>")}),
    }.items():  # either is read before tokenizer_config.json
        processor.save_pretrained(folder)
        (folder / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"must hold <\|video@placeholder\|>: FastDeploy would drop every clip"):
            fastdeploy_command(str(folder), [])
        (folder / name).unlink()


@pytest.mark.parametrize(("context", "told"), [(4096, 4096), (131_072, 32_768)])
def test_no_more_tokens_are_served_than_the_model_has_positions(folder: Path, context: int, told: int) -> None:
    config = {"vision_config": {}, "max_position_embeddings": context}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert fastdeploy_command(str(folder), [])[0].max_model_len == told
    words = split_overrides(["--max_model_len", "512"])[1]
    assert fastdeploy_command(str(folder), words)[0].max_model_len == 512


@pytest.mark.parametrize("text", ["[]", "null", "", "[" * 100_000 + "]" * 100_000], ids=lambda text: text[:3])
def test_a_spoilt_folder_is_told_of_by_its_file(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Processor.bundled("tiny").save_pretrained(folder)
    names = ("config.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.model")
    for name in (*names, "chat_template.json", "preprocessor_config.json"):
        file = folder / name
        kept = file.read_bytes() if file.is_file() else b""
        file.write_text(text, encoding="utf-8")
        assert main(["serve", str(folder), "--engine", "fastdeploy", "--print"]) == 1
        assert name in capsys.readouterr().err
        file.write_bytes(kept or b"{}")


def test_what_fastdeploy_cannot_take_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(*words: str) -> object:
        return fastdeploy_command(str(folder), split_overrides(words)[1])

    with pytest.raises(UsageError, match=r"unknown option 'adapters'.*merge adapters first"):
        made("--adapters", "a=b")
    with pytest.raises(UsageError, match=r"limit_mm_per_prompt .* cannot be read: not an object of whole numbers"):
        made("--limit_mm_per_prompt", '{"image": "x"}')
    with pytest.raises(UsageError, match=r"mm_processor_kwargs .* cannot be read: not an object like"):
        made("--mm_processor_kwargs", "[1]")
    with pytest.raises(ValueError, match=r"mm_processor image_max_pixels \('9'\) must be a int"):
        made("--mm_processor_kwargs", '{"image_max_pixels": "9"}')
    with pytest.raises(ValueError, match=r"port \(65535\) must be from 1"):
        made("--port", "65535")
    assert main(["serve", str(tmp_path), "--engine", "fastdeploy", "--print"]) == 1
    assert "merge and export adapters and runs first" in capsys.readouterr().err
    assert main(["serve", str(folder), "--engine", "fastdeploy"]) == 1
    assert "FastDeploy, which is not installed" in capsys.readouterr().err


def test_it_is_started_watched_and_ended(folder: Path, stand_in: dict[str, str]) -> None:
    port = free_port()
    child = start(folder, stand_in, "--port", str(port))
    try:
        assert child.stderr is not None
        lines = []
        for line in child.stderr:
            lines.append(line)
            if "healthy after" in line:
                break
        assert f"http://127.0.0.1:{port}/v1" in lines[-1], lines
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 128 + signal.SIGTERM, "as a shell would tell it"
    finally:
        child.kill()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quantization", "bad"), "it ended with code 3"),
        (("--quantization", "silent", "--ready_timeout", "1.5"), "must become healthy within 1.5 seconds"),
    ],
)
def test_one_that_does_not_become_healthy(
    words: tuple[str, ...], message: str, folder: Path, stand_in: dict[str, str]
) -> None:
    child = start(folder, stand_in, "--port", str(free_port()), *words)
    assert child.wait(30) == 1
    assert child.stderr is not None
    assert message in child.stderr.read()

"""FastDeploy's own server as a child process: started, watched until it is healthy, ended with us.

Refuses to know: which flags (config/fastdeploy.py), this library's own server.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

from ernie_tune.config.fastdeploy import FastDeployCommand
from ernie_tune.config.language import say

POLL_SECONDS = 0.5
_END_SECONDS = 30.0


def installed() -> bool:
    """Whether this Python has FastDeploy."""
    return importlib.util.find_spec("fastdeploy") is not None


def run(command: FastDeployCommand, ready_seconds: float) -> int:
    """Start it, say when it is healthy, and wait for its end; its exit code. Our SIGINT and SIGTERM
    are its own.

    Raises ValueError where FastDeploy is not installed, and where it ends or stays silent instead
    of becoming healthy.
    """
    if not installed():
        raise ValueError(
            say(
                "engine fastdeploy needs FastDeploy, which is not installed: see "
                "https://github.com/PaddlePaddle/FastDeploy for the package that fits "
                "your card; --print shows the command, and without --engine this library's own server answers "
                "the same API",
                "引擎 fastdeploy 需要 FastDeploy，但未安装：请从 https://github.com/PaddlePaddle/FastDeploy 选择适合显卡的软件包；"
                "--print 显示命令，不用 --engine 则由本库自带的服务器提供相同的接口",
            )
        )
    print(f"ernie_tune: {command.shell()}", file=sys.stderr, flush=True)
    child = subprocess.Popen(command.words(sys.executable), env={**os.environ, **command.environment()})
    with _forwarding(child):
        try:
            seconds = wait_healthy(child, command.port, ready_seconds)
            print(
                f"ernie_tune: healthy after {seconds:.0f} s: http://127.0.0.1:{command.port}/v1",
                file=sys.stderr,
                flush=True,
            )
            code = child.wait()
            return code if code >= 0 else 128 - code
        finally:
            _end(child)


def wait_healthy(child: subprocess.Popen[bytes], port: int, limit_seconds: float) -> float:
    """Seconds until /health answered 200. Raises ValueError when the child ends first or the time
    is over.
    """
    started = time.monotonic()
    while (passed := time.monotonic() - started) < limit_seconds:
        if child.poll() is not None:
            raise ValueError(
                say(
                    f"FastDeploy must become healthy, but it ended with code {child.returncode}; its log is above",
                    f"FastDeploy 未能就绪，以代码 {child.returncode} 结束；其日志见上",
                )
            )
        if _healthy(port):
            return time.monotonic() - started
        time.sleep(POLL_SECONDS)
    raise ValueError(
        say(
            f"FastDeploy must become healthy within {limit_seconds:g} seconds (waited {passed:.0f}); raise "
            "--ready_timeout, large models load for minutes",
            f"FastDeploy 须在 {limit_seconds:g} 秒内就绪（已等待 {passed:.0f} 秒）；请调大 --ready_timeout，大模型加载需要数分钟",
        )
    )


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

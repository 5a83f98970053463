"""The process around the application: a socket, signals, and an end that loses no answer. Needs the extra `serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType

import uvicorn

from ernie_tune.serve.app import build
from ernie_tune.serve.gate import Gate
from ernie_tune.serve.service import Service


class Server(uvicorn.Server):
    """On the first signal: refuse what is new (503, /health too), finish what is inside, then stop. On the second: stop at once."""

    def __init__(self, config: uvicorn.Config, gate: Gate, timeout_seconds: float) -> None:
        super().__init__(config)
        self.gate, self._timeout = gate, timeout_seconds
        self.on_ready: Callable[[tuple[str, int]], None] | None = None  # told where it listens
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started and self.on_ready:
            self.on_ready(self.servers[0].sockets[0].getsockname()[:2])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.gate.draining:
            super().handle_exit(sig, frame)
            return
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin the end. In the loop's thread."""
        self.gate.draining = True
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        print(f"ernie_tune: shutting down: {self.gate.inside} request(s) to finish", flush=True)
        try:
            await asyncio.wait_for(self.gate.empty.wait(), self._timeout)
        except asyncio.TimeoutError:
            print(f"ernie_tune: {self.gate.inside} request(s) given up after {self._timeout:g} seconds", flush=True)
            self.force_exit = True
        self.should_exit = True


def server(service: Service, host: str, port: int) -> Server:
    """A server that `run()` serves until a signal. Port 0: any free one."""
    app = build(service)
    config = uvicorn.Config(
        app.state.gate,
        host=host,
        port=port,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=2**16,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return Server(config, app.state.gate, service.options.shutdown_timeout_seconds)

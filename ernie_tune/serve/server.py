"""The process around the application: a socket, signals, and an end that loses no answer. Needs the
extra `serve`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn

from ernie_tune.config.language import say
from ernie_tune.serve.app import build
from ernie_tune.serve.connections import RESERVED_FILES, Connection, Connections, log_seldom, open_files
from ernie_tune.serve.gate import Gate
from ernie_tune.serve.service import Service

_FIRST_WORDS_SECONDS, _LAST_WORDS_SECONDS = 0.5, 5.0
# A thread that parses or encodes holds Python's lock for this long before the model's turn comes,
# at each of the many small steps of the model; with the usual 5 ms one large body would slow all
# answers tenfold.
_SWITCH_SECONDS = 0.0005


class Server(uvicorn.Server):
    """On the first signal: refuse what is new (503, /health too), finish what is inside, then stop.
    On the second: stop at once.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate, service: Service, house: Connections) -> None:
        super().__init__(config)
        self.gate, self.service, self.house = gate, service, house
        self.on_ready: Callable[[tuple[str, int]], None] | None = None  # told where it listens
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._loop.set_exception_handler(log_seldom())
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
        seconds = self.service.options.shutdown_timeout_seconds
        told = say(
            f"ernie_tune: shutting down: {self.gate.inside} request(s) to finish",
            f"ernie_tune：正在关闭：还有 {self.gate.inside} 个请求待完成",
        )
        print(told, file=sys.stderr, flush=True)
        if not await self._emptied(seconds):
            print(
                f"ernie_tune: {self.gate.inside} request(s) given up after {seconds:g} seconds",
                file=sys.stderr,
                flush=True,
            )
            # Their clients are told (503) before the connections go: first those that wait for the
            # model, then the others.
            await asyncio.to_thread(self.service.scheduler.close, _LAST_WORDS_SECONDS)
            await self._emptied(_FIRST_WORDS_SECONDS)
            self.gate.give_up()
            await self._emptied(_LAST_WORDS_SECONDS)
        self.should_exit = True

    async def _emptied(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.gate.empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


def server(service: Service, host: str, port: int) -> Server:
    """A server that `run()` serves until a signal. Port 0: any free one."""
    app, options = build(service), service.options
    files = open_files()
    most = options.max_connections if files is None else max(min(options.max_connections, files - RESERVED_FILES), 1)
    house = Connections(most, options.head_timeout_seconds, options.write_timeout_seconds)
    config = uvicorn.Config(
        app.state.gate,
        host=host,
        port=port,
        http=partial(Connection, house=house),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=2**16,
        timeout_keep_alive=options.idle_timeout_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=int(_LAST_WORDS_SECONDS),
    )
    return Server(config, app.state.gate, service, house)

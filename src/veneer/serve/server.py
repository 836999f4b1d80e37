"""The server process: how it ends. Answers get their time, then each is told that it ends here, then the process goes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn

KEEP_ALIVE = 75
"""Seconds after which a connection without requests is closed. Clients keep theirs for 5 (httpx, so the openai client) to
60: who closes first must be the client, or its next request meets a closing connection and is lost."""
TOLD = 2.0
"""Seconds in which answers that are cut off reach their clients; then connections are."""


class Server(uvicorn.Server):
    """After a signal the port is closed and answers go on for `drain` seconds, or until a second signal. Then `engine`
    cancels those that are left, so that each ends with an error of the API's, and what still holds on is cut off."""

    def __init__(self, config: uvicorn.Config, engine: Any, drain: float) -> None:
        super().__init__(config)
        self.engine, self.drain, self.hurried = engine, drain, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins the end, another one hurries it."""
        self.hurried, forced = self.should_exit, self.force_exit
        super().handle_exit(sig, frame)
        self.force_exit = forced  # a second Ctrl-C would set it, and cut answers off before they are told why

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends once all connections have, and soon after `drain` seconds or a second signal at the latest."""
        ending = asyncio.create_task(self._end())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        until = monotonic() + self.drain
        while monotonic() < until and not self.hurried:
            await asyncio.sleep(0.05)
        self.engine.drain(0)
        await asyncio.sleep(TOLD)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would write a traceback of each
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self.force_exit = True


def run(app: Any, engine: Any, bound: socket.socket, drain: float) -> None:
    """Start the engine and serve until a signal; then finish what runs for up to `drain` seconds, or to a second signal.

    After a signal the process ends here, with code 0.
    """
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of each client that leaves in mid-answer
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE
    )
    server = Server(config, engine, drain)
    engine.start()
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:  # the server has finished, and hands the signal on
        pass
    finally:
        if server.should_exit:
            for sig in (signal.SIGINT, signal.SIGTERM):
                signal.signal(sig, _leave)
        if not server.hurried:
            engine.shutdown(0)
        if server.should_exit:
            _leave()


def _leave(*_: Any) -> None:
    """End the process now. Python would wait for threads that read adapters, however slow the disk is, and give signals
    back to the system meanwhile, which would kill it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

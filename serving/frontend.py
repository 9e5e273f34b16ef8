"""A front end: a process that takes requests, and has another one compute. Several listen on one port.

The supervisor starts it, as `python -m serving.frontend`; see `serving.supervisor`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading

from serving import child
from serving.child import DRAIN, Child
from serving.command import open_server, read_access, start_tracing
from serving.link import Count, Counted, Done, Served
from serving.remote import Connection, RemoteModels
from serving.server import Server

log = logging.getLogger(__name__)


def listen(process: Child) -> None:
    """Answer requests until the supervisor says that it is enough, then finish those under way."""
    config = process.task.config
    access = read_access(config)
    tracing = start_tracing(config)
    models = RemoteModels(tracing.follow if tracing else None)
    backend = Backend(process.door, config.frontend_bytes, models)
    backend.served.wait()
    server = open_server(config, access, models, models, tracing, shared=True)
    backend.announce_to(server)
    process.report()
    while process.wait() != DRAIN:
        pass
    server.stop(config.grace)
    if tracing:
        tracing.close()


class Backend:
    """The engine process, whichever it is now: one that died is followed by the next."""

    def __init__(self, door: socket.socket, memory: int, models: RemoteModels) -> None:
        """Look for it, on a thread of its own.

        Args:
            door: Takes connections to it.
            memory: Bytes to share with it.
            models: Follow what it serves.
        """
        self._door, self._memory, self._models = door, memory, models
        self.served = threading.Event()
        """Whether it is there, and what it serves is known."""
        self._lock = threading.Lock()
        self._server: Server | None = None
        threading.Thread(target=self._run, name="backend", daemon=True).start()

    def announce_to(self, server: Server) -> None:
        """Have a server tell its clients from now on whether there is an engine process."""
        with self._lock:
            self._server = server
            server.announce(self.served.is_set())

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException:
            log.exception("answers are heard no longer")
            os._exit(1)  # who takes requests that nobody answers is better replaced

    def _follow(self) -> None:
        while True:
            connection = Connection(self._door, self._memory)
            for message in connection.listen():
                match message:
                    case Served():
                        self._models.follow(message, connection)
                        connection.send(Done(message.id))
                        self._announce(True)
                    case Count():
                        connection.send(Counted(message.id, self._models.own_counts()))
            self._announce(False)

    def _announce(self, ready: bool) -> None:
        with self._lock:
            if ready == self.served.is_set():
                return
            if ready:
                self.served.set()
            else:
                self.served.clear()
            if self._server:
                self._server.announce(ready)


if __name__ == "__main__":
    child.run(listen)

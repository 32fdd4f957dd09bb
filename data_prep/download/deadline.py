"""How does a download end on time, whatever the server does? One thread cuts sockets whose time is over.

A socket's own timeout starts anew with every byte, so a server that sends one byte a second holds a thread for ever,
in the TLS handshake, the header or the body. A cut socket makes the blocked call return at once.
"""

from __future__ import annotations

import heapq
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Deadlines:
    """Sockets and the moments at which they are cut; one thread for all, started with the first socket."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []  # heap of (moment, ticket)
        self._sockets: dict[int, socket.socket] = {}
        self._tickets = itertools.count()
        self._thread: threading.Thread | None = None

    @contextmanager
    def cut(self, opened: socket.socket, moment: float) -> Iterator[None]:
        """Cut `opened` at `moment` (time.monotonic) unless the block has ended before; never closes it."""
        ticket = next(self._tickets)
        with self._changed:
            if self._thread is None or not self._thread.is_alive():  # the latter after a fork
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            self._sockets[ticket] = opened
            heapq.heappush(self._waiting, (moment, ticket))
            if self._waiting[0][1] == ticket:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._sockets.pop(ticket, None)  # its heap entry is dropped when its moment comes

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                while self._waiting and self._waiting[0][0] <= now:
                    _, ticket = heapq.heappop(self._waiting)
                    late = self._sockets.pop(ticket, None)
                    if late is not None:
                        with suppress(OSError):  # it has ended by itself
                            socket.socket.shutdown(late, socket.SHUT_RDWR)  # under TLS too, without its lock
                self._changed.wait(self._waiting[0][0] - now if self._waiting else None)

"""What can a web server do wrong? One on the loopback interface that does all of it, each under its own path."""

from __future__ import annotations

import gzip
import io
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

DRIP = 0.05  # seconds between two bytes of a slow server
HUGE = 300 * 2**20  # bytes of a body that nobody wants
PIECE = bytes(2**20)


def picture(seed: int, side: int = 48, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    """An encoded image of smooth colours; the same for the same arguments."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((side, side + 8), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = picture(1)


class Server(ThreadingHTTPServer):
    """A server on 127.0.0.1 that counts its visits and can be told to run something on a visit of /trap."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.visits: Counter[str] = Counter()
        self.trap: Callable[[], None] = lambda: None
        self.over = threading.Event()

    @property
    def url(self) -> str:
        """Where it is, without a path."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what this server is for."""


@contextmanager
def serving() -> Iterator[Server]:
    """A running server, gone afterwards."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Looks a path up in BEHAVIOURS."""

    server: Server

    def do_GET(self) -> None:
        """Answer, each in its way."""
        path = self.path.partition("?")[0]
        self.server.visits[path] += 1
        behave = BEHAVIOURS.get(path.strip("/").partition("/")[0], lambda handler: handler.answer(status=404))
        with suppress(OSError):
            behave(self)
        self.close_connection = True

    def answer(
        self,
        content: bytes = b"",
        kind: str = "image/jpeg",
        status: int = 200,
        length: int | None = None,
        **headers: str,
    ) -> None:
        """An answer with these parts; `length` is the Content-Length where it is a lie, and -1 sends none."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length != -1:
            self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def is_first(self) -> bool:
        """Whether nobody has asked for this path before."""
        return self.server.visits[self.path] == 1

    def drip(self, content: bytes) -> None:
        """Send one byte at a time, and go on for ever."""
        self.wfile.write(content)
        while not self.server.over.wait(DRIP):
            self.wfile.write(b"x")

    def reset(self) -> None:
        """End the connection with a RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def pour(self, length: int) -> None:
        """Send 300 MB of nothing."""
        self.answer(length=length)
        for _ in range(HUGE // len(PIECE)):
            self.wfile.write(PIECE)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _once(otherwise: Callable[[Handler], None]) -> Callable[[Handler], None]:
    return lambda handler: otherwise(handler) if handler.is_first() else handler.answer(GOOD)


def _to(place: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(status=302, Location=place)


def _tag(value: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(GOOD, X_Robots_Tag=value)


def _status(status: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(status=status, **headers)


def _good(handler: Handler) -> None:
    name = handler.path.strip("/").partition("/")[2]
    handler.answer(picture(int(name)) if name.isdigit() else GOOD)


def _trap(handler: Handler) -> None:
    handler.server.trap()
    handler.answer(GOOD)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn

BEHAVIOURS: dict[str, Callable[[Handler], None]] = {  # first part of the path -> what happens
    "good": _good,
    "trap": _trap,
    "turned": lambda handler: handler.answer(picture(2, exif=EXIF)),
    "cmyk": lambda handler: handler.answer(picture(3, mode="CMYK")),
    "png16": lambda handler: handler.answer(_png16(), "image/png"),
    "tiny": lambda handler: handler.answer(picture(4, side=8)),
    "drip": lambda handler: (handler.answer(length=10**6), handler.drip(b"")),
    "drip-header": lambda handler: handler.drip(b"HTTP/1.0 200 OK\r\nX-Slow: "),
    "hang": lambda handler: handler.server.over.wait(60),
    "huge": lambda handler: handler.pour(HUGE),
    "endless": lambda handler: handler.pour(-1),
    "gzip": lambda handler: handler.answer(gzip.compress(GOOD), Content_Encoding="gzip"),
    "gzip-bomb": lambda handler: handler.answer(gzip.compress(bytes(2**23)), Content_Encoding="gzip"),
    "reset": Handler.reset,
    "reset-once": _once(Handler.reset),
    "busy": _status(503),
    "busy-once": _once(_status(503, Retry_After="0")),
    "busy-for-long": _status(503, Retry_After="3600"),
    "busy-senseless": _once(_status(429, Retry_After="soon")),
    "forbidden": _status(403),
    "gone": _status(410),
    "broken": _status(500),
    "html": lambda handler: handler.answer(b"<html>not found</html>", "text/html"),
    "html-as-jpeg": lambda handler: handler.answer(b"<html>not found</html>"),
    "jpeg-as-html": lambda handler: handler.answer(GOOD, "text/html"),
    "svg": lambda handler: handler.answer(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "empty": Handler.answer,
    "nothing": _status(204),
    "cut": lambda handler: handler.answer(GOOD[:300], length=len(GOOD)),
    "cut-chunk": lambda handler: handler.answer(
        b"400\r\n" + GOOD[:300], length=-1, Transfer_Encoding="chunked"
    ),
    "short-length": lambda handler: handler.answer(GOOD, length=len(GOOD) // 2),
    "no-length": lambda handler: handler.answer(GOOD, length=-1),
    "garbage": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "many-headers": lambda handler: handler.answer(GOOD, **{f"X-{number}": "1" for number in range(200)}),
    "to-good": _to("/good/7"),
    "to-accents": _to("/good/é ü"),
    "to-file": _to("file:///etc/hostname"),
    "to-data": _to("data:image/gif;base64,R0lGODlhAQABAAAAACw="),
    "to-private": _to("http://127.0.0.2/secret"),
    "to-metadata": _to("http://169.254.169.254/latest/meta-data/"),
    "to-itself": _to("/to-itself"),
    "to-nowhere": _status(302),
    "noai": _tag("noai"),
    "noimageai": _tag("all, NoImageAI"),
    "noindex": _tag("noindex"),
    "noimageindex": _tag("noarchive,noimageindex"),
    "noai-for-us": _tag("m3i-data-prep: noai"),
    "noai-for-others": _tag("otherbot: noai, noindex"),
    "noai-on-404": _status(404, X_Robots_Tag="noindex"),
}


def _png16() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()

"""A server of pictures on the loopback, and the pictures; one of each for all tests of the sources."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> bytes:
    """An encoded picture that differs with the seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size)
    buffer = io.BytesIO()
    small.convert(mode).save(buffer, form)
    return buffer.getvalue()


@dataclass(frozen=True)
class Server:
    """Where the files are, and the files by path; what is not among them is 404."""

    url: str
    files: dict[str, bytes]

    def put(self, path: str, content: bytes) -> str:
        """The address under which `content` can be had from now on."""
        self.files[path] = content
        return f"{self.url}{path}"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with served() as one:
        yield one


@contextmanager
def served() -> Iterator[Server]:
    """A server without pictures yet, until the block ends."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield Server(f"http://127.0.0.1:{http.server_port}", files)
        http.shutdown()
        thread.join()

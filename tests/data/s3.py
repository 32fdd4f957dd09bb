"""How does a test get an S3 store on the loopback that fails as real ones do? moto's, behind faults of ours.

`python -m tests.data.s3` is one for tests that fork: it prints the environment that finds it, and refuses everything
between one SIGUSR1 and the next.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.request import Request, urlopen

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET, REGION = "bucket", "us-west-2"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}


@dataclass
class Faults:
    """What goes wrong with requests from now on; counted."""

    refused: float = 0.0  # share answered by `refusal`
    refusal: tuple[str, str] = ("503 Slow Down", "SlowDown")  # status and code
    stalled: float = 0.0  # share that waits for `stall` seconds first
    stall: float = 2.0
    methods: tuple[str, ...] = ("GET", "HEAD")  # of the requests that it concerns
    num_requests: int = 0
    num_refused: int = 0
    num_stalled: int = 0
    random: Random = field(default_factory=lambda: Random(0))
    lock: Any = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Store:
    url: str  # of the server
    faults: Faults
    environment: dict[str, str]  # by which s3fs finds it

    def put(self, folder: Path, prefix: str) -> str:
        """Copies a folder; gives its URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".idx":
                self.files.put_file(str(path), f"{BUCKET}/{prefix}/{path.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"

    @property
    def files(self) -> Any:
        """The file system, as fsspec has it."""
        place = {"endpoint_url": self.url, "region_name": KEYS["AWS_DEFAULT_REGION"]}
        return fsspec.filesystem(
            "s3", key="test", secret="test", client_kwargs=place, use_listings_cache=False
        )


def with_faults(
    application: Callable[..., Iterable[bytes]], faults: Faults
) -> Callable[..., Iterable[bytes]]:
    """A WSGI application that fails as `faults` says at the moment of each request."""

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in faults.methods:
            with faults.lock:
                faults.num_requests += 1
                is_refused = faults.random.random() < faults.refused
                is_stalled = faults.random.random() < faults.stalled
                faults.num_refused += is_refused
                faults.num_stalled += is_stalled
            if is_stalled:
                time.sleep(faults.stall)
            if is_refused:
                status, code = faults.refusal
                start_response(status, [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>Not now, not you.</Message></Error>".encode()]
        return application(environ, start_response)

    return serve


@contextmanager
def s3_store() -> Iterator[Store]:
    """A store with an empty bucket, until the block ends."""
    faults = Faults()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line a request
    application = with_faults(DomainDispatcherApplication(create_backend_app), faults)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    store = Store(url, faults, {**KEYS, "AWS_ENDPOINT_URL": url})
    try:
        forget = Request(f"{url}/moto-api/reset", method="POST")  # what other stores of this process held
        urlopen(forget, timeout=60).close()
        store.files.mkdir(BUCKET)
        yield store
    finally:
        server.shutdown()
        thread.join()


def serve() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # in the server's threads too
    with s3_store() as store:
        store.faults.methods = ("GET", "HEAD", "PUT", "POST", "DELETE")
        print(json.dumps(store.environment), flush=True)
        while signal.sigwait({signal.SIGUSR1}):
            store.faults.refused = 1.0 - store.faults.refused


if __name__ == "__main__":
    serve()

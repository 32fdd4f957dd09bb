"""What did a build write? Samples by key or name, through the command that a user types."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from data_prep.__main__ import main
from data_prep.check import check

LOOPBACK = ["--allow-private", "127.0.0.0/8", "--metadata-threads", "1", "--threads", "4", "--retries", "0"]


def run(*arguments: str | Path) -> int:
    """The exit code of `python -m data_prep build ...` with one worker."""
    return main(["build", *map(str, arguments), "--workers", "1", "--max-bad", "1"])


def samples(folder: Path) -> dict[str, dict]:
    """The .json of every sample by its key, with its image as `image` and its class number as `cls`; all verified."""
    check(folder)
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for key, parts in members.items():
            record = json.loads(parts.pop("json"))
            (image,) = (parts[extension] for extension in ("jpg", "png", "webp") if extension in parts)
            text = parts["txt"].decode() if "txt" in parts else None
            found[key] = {
                **record,
                "image": image,
                "cls": int(parts["cls"]) if "cls" in parts else None,
                "txt": text,
            }
    return found

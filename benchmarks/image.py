"""Does the image build without a registry, how large is it, and does the project run inside it as non-root?

    sudo [MOUNTS=...] python benchmarks/image.py [--name image_cuda] [WORD ...]

Builds by jobs/image/build_on_debian.sh, whose variables count here too, and runs WORD ... in the image (default: the
kernels' self-test). `layers` are uncompressed, oldest first; what a registry keeps is smaller. `seconds` are of a
base made by debootstrap, of the build with its downloads, and of the command. `load` is the machine's before: others
may have worked on it. Writes benchmarks/results/<name>.json, also when the command fails; `exit_code` tells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="image_cuda", help="of the result")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="WORD")
    arguments = parser.parse_args()
    arguments.command = arguments.command or ["kernels", "--quick"]
    load, begun, reuses = os.getloadavg()[0], time.monotonic(), os.environ.get("REUSE") == "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.json"
        ended = subprocess.run(
            [ROOT / "jobs/image/build_on_debian.sh", *arguments.command],
            env=os.environ | {"FACTS": str(path)},
            check=False,
        )
        if not path.exists():
            sys.exit("the image was not built, and nothing written: see above")
        facts = json.loads(path.read_text())
    before = 0 if reuses else sum(facts["seconds"].values())
    facts["seconds"]["command"] = round(time.monotonic() - begun - before)
    record.keep(
        arguments.name,
        "the image builds on a Debian base made by debootstrap, with buildah, and the project runs in it as non-root",
        torch.device("cpu"),
        built_for=os.environ.get("DEVICE", "cuda"),
        load=round(load, 1),
        command=arguments.command,
        exit_code=ended.returncode,
        **facts,
    )


if __name__ == "__main__":
    main()

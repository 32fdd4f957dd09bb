"""What does a process that has nothing of this project compute from an exported folder?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class FreshProcessError(Exception):
    """The process ended with an error, whose last lines are the message, and this exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_fresh(
    probe: Path, images: dict[str, Tensor], *arguments: str, python: str = sys.executable
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and report of `python -I PROBE ARGUMENTS... IMAGES OUTPUTS`; FreshProcessError when it fails.

    `-I` leaves out this project, the current folder and PYTHONPATH. The report is the metadata "told", as JSON.
    """
    with tempfile.TemporaryDirectory() as place:
        inputs, outputs = Path(place) / "images.safetensors", Path(place) / "outputs.safetensors"
        save_file(images, inputs)
        own = {"HF_MODULES_CACHE": str(Path(place) / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, "-I", "-W", "ignore", str(probe), *arguments, str(inputs), str(outputs)],
            cwd=place,
            env=os.environ | own,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise FreshProcessError(done.stderr.strip()[-2000:], done.returncode)
        with safe_open(outputs, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            return tensors, json.loads(file.metadata()["told"])

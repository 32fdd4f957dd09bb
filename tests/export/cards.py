"""Does the how-to-load of a model card run, in a process that has nothing of this project?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ALONE = "import importlib.util, sys\nassert importlib.util.find_spec('pretrain') is None\n"


def code_of(folder: Path) -> str:
    """The Python blocks of the card, for this folder."""
    return blocks_of((folder / "README.md").read_text()).replace("FOLDER", str(folder))


def blocks_of(text: str) -> str:
    """The Python blocks of a card, as they stand there."""
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks, f"no code is shown in {text}"
    return "\n".join(blocks)


def run_alone(code: str, place: Path, *arguments: str, python: str = sys.executable) -> str:
    """What the code prints, run in `place` without this project on the path; its error otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(place / "modules")
    done = subprocess.run(
        [python, "-I", "-c", ALONE + code, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

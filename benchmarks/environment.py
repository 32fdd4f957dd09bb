"""How does a script get a package that this project does without? In an environment of its own, beside this one."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


def make(place: Path, requirements: Sequence[str]) -> Path:
    """The interpreter of a new environment with these, not with what they require; all else is that of this one."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    # Sorted last, so that what is installed there wins.
    (Path(own.stdout.strip()) / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *requirements], check=True)
    return python

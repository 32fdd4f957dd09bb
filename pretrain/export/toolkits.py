"""Which interpreter has the toolkits that prove a format? Asked before anything heavy is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROBES = {
    "openmmlab": Path(__file__).parent / "openmmlab_probe.py"
}  # by format; `check` tells what is missing
SECONDS = 60  # an interpreter on a slow file system may take


def require_python(program: str) -> None:
    """FileNotFoundError or ValueError unless it is a Python interpreter."""
    if shutil.which(program) is None:
        raise FileNotFoundError(f"--python {program} is no program: give the path of a Python interpreter")
    if program == sys.executable:
        return
    asked = _ask(program, "-c", "import sys; print(sys.version_info[0])")
    if asked.stdout.strip() != "3":
        raise ValueError(
            f"--python {program} does not answer as Python 3 does: give the path of an interpreter"
        )


def require_toolkits(program: str, formats: Sequence[str], *more: str) -> None:
    """ValueError unless the interpreter finds what proves those of the formats that toolkits prove, and `more`."""
    for name in (name for name in formats if name in PROBES):
        if reason := missing_toolkit(program, name, *more):
            raise ValueError(
                f"--python {program} cannot prove {name}, since {reason} there: install that, name another "
                "interpreter, or leave --python out, and the export is kept without this proof (exit code 3)"
            )


def missing_toolkit(program: str, format_name: str, *more: str) -> str:
    """What of a format's toolkits and `more` the interpreter does not find, "mmengine is missing"; nothing if all."""
    return _ask(program, str(PROBES[format_name]), "check", *more).stderr.strip()


def _ask(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, "-I", *arguments], capture_output=True, text=True, timeout=SECONDS)

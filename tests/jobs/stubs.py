"""What stands in for programs that a script starts? Small bash files that leave what they were given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.paths import ROOT


def write_program(path: Path, text: str) -> None:
    """An executable bash file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def write_launcher(folder: Path, text: str = "") -> None:
    """FOLDER as ENV: `deepspeed` leaves its arguments in FOLDER/arguments and does `text`; one GPU is there."""
    write_program(folder / "bin" / "deepspeed", f'printf "%s\\n" "$@" >{folder}/arguments\n{text}')
    write_program(folder / "bin" / "python", 'case $* in "- "*) echo "1 29500" ;; *) exit 1 ;; esac')


def launched(folder: Path) -> list[str]:
    """The arguments of `deepspeed`, in which the file of hosts that it was given has no name."""
    words = (folder / "arguments").read_text().splitlines()
    if "--hostfile" in words:
        words[words.index("--hostfile") + 1] = "HOSTFILE"
    return words


def run_script(
    path: str, *arguments: str, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script of the repository in an environment that holds PATH, HOME and what is given, nothing else."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [str(ROOT / path), *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=ROOT,
    )

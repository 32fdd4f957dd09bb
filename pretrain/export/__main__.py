"""How does a run become a file that another toolkit loads?

python -m pretrain.export RUN --to FORMAT
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from pretrain.checkpoint import WEIGHTS
from pretrain.command import exit_code, require_place
from pretrain.config import Run
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.exits import FAILED
from pretrain.export.agreement import NotProven, summary
from pretrain.export.formats import EXPORTERS, Exported, check_target, choose, export
from pretrain.export.trained import read_trained

UNPROVEN = 3  # exit code: written and compared by us, but the toolkit itself was not there to read it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out folder of a pre-training run")
    parser.add_argument("--to", required=True, help=f"format: {', '.join(EXPORTERS)}")
    parser.add_argument("--out", type=Path, help="folder of the export (RUN/export/FORMAT)")
    parser.add_argument("--which", default="teacher", help="teacher (default) or student")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter that has the toolkits, where they prove a format (openmmlab); default: this one",
    )
    parser.add_argument("--step", default="last", help="checkpoint: first, last or a number (last)")
    return parser.parse_args(arguments)


def export_run(arguments: list[str] | None = None) -> Exported:
    """Exports, proves and reports. Raises NotProven, ValueError and OSError; the target folder is then as it was."""
    options = parse(arguments)
    if options.which not in WEIGHTS:
        raise ValueError(f"--which {options.which!r} is unknown; choose from {sorted(WEIGHTS)}")
    step_folder = find_checkpoint(options.run, options.step, options.which)
    exporter = choose(options.to, Run.from_json((step_folder / "run.json").read_text()))
    suffix = "" if options.which == "teacher" else f"-{options.which}"
    folder = options.out or options.run / "export" / f"{options.to}{suffix}"
    if options.python != sys.executable and exporter.prove_in_toolkits is None:
        raise ValueError(
            f"--python {options.python} would be ignored: no other interpreter proves {options.to}; leave it out"
        )
    _require_python(options.python)
    require_place("--out", folder)
    check_target(folder, options.to, 0)
    print(f"reads the {options.which} of {step_folder}")
    trained = read_trained(options.run, step_folder, options.which, exporter.parts)
    print(f"writes and compares {options.to}: {trained.num_bytes / 2**20:,.0f} MiB of weights in the towers")
    exported = export(trained, options.to, folder, options.python)
    for file, told in exported.keys.items():
        print(f"{file}: {told}")
    for line in summary(exported.proof):
        print(f"{'compared' if exported.unproven else 'proven'}: {line}")
    print(f"written to {exported.folder}; every tensor by name in keys.json")
    return exported


def _require_python(program: str) -> None:
    """FileNotFoundError or ValueError unless it is a Python interpreter."""
    if shutil.which(program) is None:
        raise FileNotFoundError(f"--python {program} is no program: give the path of a Python interpreter")
    if program == sys.executable:
        return
    asked = subprocess.run(
        [program, "-I", "-c", "import sys; print(sys.version_info[0])"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if asked.stdout.strip() != "3":
        raise ValueError(
            f"--python {program} does not answer as Python 3 does: give the path of an interpreter"
        )


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 proven, 1 not written, UNPROVEN written all the same, 130 interrupted.

    A mistake of the user's, and an export that is not proven, are told in one message.
    """
    done: list[Exported] = []
    try:
        code = exit_code(
            lambda given: done.append(export_run(given)), arguments, "the folder of the export is as it was"
        )
    except NotProven as error:
        print(f"error: the export is not proven and was not kept: {error}", file=sys.stderr)
        return FAILED
    if code == 0 and done[0].unproven:
        print(f"kept, but not proven by its toolkit: {done[0].unproven}", file=sys.stderr)
        return UNPROVEN
    return code


if __name__ == "__main__":
    sys.exit(main())

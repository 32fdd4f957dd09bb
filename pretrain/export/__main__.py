"""How does a run become files that other toolkits load?

python -m pretrain.export RUN --to FORMAT [FORMAT ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.command import exit_code
from pretrain.exits import FAILED
from pretrain.export.names import ALL, FORMATS, NotProven
from pretrain.export.toolkits import require_python, require_toolkits

if TYPE_CHECKING:
    from pretrain.export.formats import Exported

UNPROVEN = 3  # exit code: written and compared by us, but the toolkit itself was not there to read it


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out folder of a pre-training run")
    parser.add_argument(
        "--to",
        required=True,
        nargs="+",
        metavar="FORMAT",
        help=f"one or several of {', '.join(FORMATS)}; or {ALL}: each that holds the run's backbone. The weights are "
        "read once",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the export; of several, the folder of theirs (RUN/export/FORMAT)"
    )
    parser.add_argument("--which", default="teacher", help="teacher (default) or student")
    parser.add_argument(
        "--python",
        help="interpreter that has the toolkits, where they prove a format (openmmlab); default: this one",
    )
    parser.add_argument("--step", default="last", help="checkpoint: first, last or a number (last)")
    return parser.parse_args(arguments)


def export_run(arguments: list[str] | None = None) -> list[Exported]:
    """Exports, proves and reports, a format after the other.

    Raises ValueError and OSError, and NotProven when the others are done; the folder of what failed is as it was.
    """
    options = parse(arguments)
    if options.python is not None:
        require_python(options.python)
        require_toolkits(options.python, options.to)
    from pretrain.export.several import export_all  # torch and the toolkits take seconds

    return export_all(options)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 proven, 1 not written, UNPROVEN written all the same, 130 interrupted; of several the worst.

    A mistake of the user's, and an export that is not proven, are told in one message.
    """
    done: list[Exported] = []
    try:
        code = exit_code(
            lambda given: done.extend(export_run(given)), arguments, "the folder of the export is as it was"
        )
    except NotProven as error:
        print(f"error: the export is not proven and was not kept: {error}", file=sys.stderr)
        return FAILED
    return code or (UNPROVEN if any(exported.unproven for exported in done) else 0)


if __name__ == "__main__":
    sys.exit(main())

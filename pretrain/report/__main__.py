"""What became of a run? One page to look at: python -m pretrain.report RUN writes RUN/report.html."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.files import write_atomic
from pretrain.command import exit_code, no_folder, require_place
from pretrain.report.settings import Settings


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pretrain.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out folder of a pre-training run")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="folders of the sources, in place of those that training recorded",
    )
    parser.add_argument(
        "--heldout", type=Path, help="data set of held-out images; that of the evaluation if left out"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, in place of the checkpoint's")
    parser.add_argument("--out", type=Path, help="file to write (RUN/report.html)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=Settings.candidates,
        help=f"training images among which neighbours are sought ({Settings.candidates})",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Writes the page, whole or not at all, and returns its path.

    FileNotFoundError and ValueError name value, rule and remedy, before anything is drawn.
    """
    options = parse(arguments)
    if options.candidates < 1:
        raise ValueError(f"--candidates {options.candidates} must be at least 1")
    for folder in filter(None, [options.heldout, options.tokenizer]):
        if not folder.is_dir():
            raise FileNotFoundError(f"{no_folder(folder)}: name one that exists, or leave the option out")
    out = options.out or options.run / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file, such as {out / 'report.html'}")
    from pretrain.named_folders import named_folders  # takes seconds, with torch and the toolkits
    from pretrain.report.page import heldout_folder, page
    from pretrain.report.record import read_record

    record = read_record(options.run, named_folders("--data", options.data), options.tokenizer)
    require_place("--out", out)
    heldout = heldout_folder(record, options.heldout)
    text = page(
        record,
        heldout,
        Settings(candidates=options.candidates),
        lambda part: print(f"drawing: {part}", flush=True),
    )
    write_atomic(out, text.encode("utf-8"))
    print(f"written to {out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return out


if __name__ == "__main__":
    sys.exit(exit_code(main))

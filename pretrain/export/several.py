"""How does one checkpoint, read once, become the exports to several formats?"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint import WEIGHTS
from pretrain.command import require_place
from pretrain.config import Run
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.export.agreement import summary
from pretrain.export.formats import (
    Exported,
    Exporter,
    check_target,
    choose,
    export,
    fitting,
    only_if_written,
)
from pretrain.export.names import ALL, NotProven
from pretrain.export.toolkits import missing_toolkit, require_toolkits
from pretrain.export.trained import Trained, read_trained


def export_all(options: argparse.Namespace) -> list[Exported]:
    """Exports, proves and reports; `options` are those of the command.

    Raises ValueError and OSError before anything is read where it can; NotProven when all formats were tried.
    """
    if options.which not in WEIGHTS:
        raise ValueError(f"--which {options.which!r} is unknown; choose from {sorted(WEIGHTS)}")
    step_folder = find_checkpoint(options.run, options.step, options.which)
    run = Run.from_json((step_folder / "run.json").read_text())
    chosen = {name: choose(name, run) for name in _names(options.to, run)}
    chosen = dict(sorted(chosen.items(), key=lambda one: one[1].lets_go))
    folders = {name: _folder(options, name, is_alone=len(chosen) == 1) for name in chosen}
    _check_python(options.python, chosen, run)
    with only_if_written(folders.values()):
        return _export_each(options, step_folder, chosen, folders)


def _export_each(
    options: argparse.Namespace, step_folder: Path, chosen: dict[str, Exporter], folders: dict[str, Path]
) -> list[Exported]:
    """One after the other, of weights that are read once."""
    for name, folder in folders.items():
        require_place("--out", folder)
        check_target(folder, name, 0)
    print(f"reads the {options.which} of {step_folder}")
    trained = read_trained(options.run, step_folder, options.which, parts_of(chosen.values()))
    if trained.unevaluated:
        print(
            f"warning: the card has no metrics, since {trained.unevaluated}: evaluate again", file=sys.stderr
        )
    for name, folder in folders.items():  # what the first ones take is not there for the last
        before = list(folders).index(name) + 1
        copies = sum(exporter.num_copies for exporter in list(chosen.values())[:before])
        check_target(folder, name, copies * trained.num_bytes)
    done, failed = [], {}
    for name, folder in folders.items():
        one = replace(trained, is_last=name == list(folders)[-1])
        try:
            done.append(_export_one(one, name, folder, options.python or sys.executable))
        except NotProven as error:
            failed[name] = str(error)
    if failed:
        raise NotProven(
            "; ".join(f"{name}: {told}" if len(chosen) > 1 else told for name, told in failed.items())
        )
    return done


def parts_of(exporters: Collection[Exporter]) -> set[str] | None:
    """Modules of the towers that are read for all of them; None: every one."""
    if any(exporter.parts is None for exporter in exporters):
        return None
    return {part for exporter in exporters for part in exporter.parts or ()}


def _names(given: list[str], run: Run) -> list[str]:
    """The formats without repetition; ValueError for `all` among others."""
    if ALL not in given:
        return list(dict.fromkeys(given))
    if len(given) > 1:
        raise ValueError(f"--to {' '.join(given)} names formats beside {ALL!r}: give either")
    return fitting(run)


def _folder(options: argparse.Namespace, name: str, is_alone: bool) -> Path:
    suffix = "" if options.which == "teacher" else f"-{options.which}"
    if options.out is not None:
        return options.out if is_alone else options.out / name
    return options.run / "export" / f"{name}{suffix}"


def _check_python(program: str | None, chosen: dict[str, Exporter], run: Run) -> None:
    """ValueError for an interpreter that would be ignored or lacks a toolkit; without one, says what will be open."""
    asking = {name: one for name, one in chosen.items() if one.prove_in_toolkits is not None}
    if program is not None and not asking:
        raise ValueError(
            f"--python {program} would be ignored: no other interpreter proves {', '.join(chosen)}; leave it out"
        )
    for name, exporter in asking.items():
        more = exporter.more_toolkits.get(run.backbone.family, ())
        if program is not None:
            require_toolkits(program, [name], *more)
        elif reason := missing_toolkit(sys.executable, name, *more):
            print(
                f"{name} will be kept, not proven by its toolkits, and the command end with exit code 3: {reason} "
                "here. --python names an interpreter that has them"
            )


def _export_one(trained: Trained, name: str, folder: Path, python: str) -> Exported:
    begun = time.monotonic()
    print(
        f"writes and compares {name}: {trained.num_bytes / 2**20:,.0f} MiB of weights in the towers",
        flush=True,
    )
    exported = export(trained, name, folder, python)
    for file, told in exported.keys.items():
        print(f"{file}: {told}")
    for line in summary(exported.proof):
        print(f"{'compared' if exported.unproven else 'proven'}: {line}")
    print(
        f"written to {exported.folder} in {time.monotonic() - begun:.1f} s; every tensor by name in keys.json",
        flush=True,
    )
    if exported.unproven:
        print(f"kept, but not proven by its toolkit: {exported.unproven}", file=sys.stderr, flush=True)
    return exported

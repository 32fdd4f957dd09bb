"""Is every node fit for this run? All checks in a few seconds, and what fails is told with the name of its node.

    deepspeed --module pretrain.preflight ARGUMENTS OF pretrain/main.py     once a rank, as jobs/local/pretrain.sh
                                                                            does with PREFLIGHT=1
    python -m pretrain.preflight [ARGUMENTS]                                one rank on this machine; without
                                                                            arguments the machine alone

Ends with 0, with 1 when a check failed, with 2 when the arguments cannot be right, after which no job script should
start the same again; with 76 when ranks did not come in time or were lost, as training would. Warnings do not count.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.arguments import read
from pretrain.config import Run
from pretrain.exits import FAILED as FAILED_CODE
from pretrain.exits import FINISHED, INTERRUPTED, LOST, MISTAKE
from pretrain.preflight import tell
from pretrain.preflight.board import Board, Silent
from pretrain.preflight.check import Here, Row, gather, judge, look_at_all
from pretrain.preflight.checks import CHECKS, chosen
from pretrain.preflight.meeting import NotMet, meet
from pretrain.preflight.options import Options, help_text, read_options
from pretrain.preflight.ranks import Ranks, ranks_of
from pretrain.preflight.same import OURS, counted
from pretrain.preflight.told import FAILED, Problem

FRAME = "╭╮╰╯│─|+ "  # around a mistake that tyro tells


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of this rank: the same on all ranks that have met."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nOptions, rank 0's:\n{help_text()}\n\nChecks:")
        print("\n".join(f"  {name}: {check.text}" for name, check in CHECKS.items()))
        return FINISHED
    try:
        options, rest = read_options(arguments, list(CHECKS))
        ranks = ranks_of()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    begun = time.monotonic()
    try:
        board, options = meet(ranks, options)
    except NotMet as error:
        if ranks.is_node_first:
            told = "preflight FAILED, as rank 0 tells" if error.is_heard else "error"
            print(f"{told}: {error}", file=sys.stderr)
        return LOST if error.is_lost else FAILED_CODE
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        return check_all(board, ranks, options, rest, begun)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Silent, dist.DistError) as error:  # the board went with rank 0
        print(f"error: {ranks.place} lost rank 0: {str(error).splitlines()[0]}", file=sys.stderr)
        return LOST


def check_all(board: Board, ranks: Ranks, options: Options, arguments: Sequence[str], begun: float) -> int:
    """All checks of a rank that has met the others; rank 0 tells what they found. Exit code."""
    here = Here(ranks, board, options, device_of(ranks), arguments=tuple(arguments))
    here.run, here.paths, here.mistake = read_run(arguments)
    board.begin("counting GPUs")
    if here.is_gpu:
        board.count("gpus")
    if ranks.rank == 0:
        board.tell("plan", chosen(here, here.run is not None))
    board.meet("devices", ranks.world)
    here.num_gpus = board.number("gpus")
    checks = {name: CHECKS[name] for name in board.hear("plan")}
    told, silent = gather(here, look_at_all(checks, here))
    if ranks.rank > 0:
        return follow(here)
    rows = [judge(name, check, told, here) for name, check in checks.items()]
    if silent:
        rows.append(
            Row(
                "alive",
                FAILED,
                f"{len(told)} of {ranks.world} ranks",
                "every rank tells what it found",
                tuple(silent),
            )
        )
    seconds = time.monotonic() - begun
    where = counted(ranks.world, ranks.nodes)
    if options.report:
        try:
            tell.write_report(Path(options.report), rows, seconds, told)
        except OSError as error:
            unwritten = Problem(ranks.place, f"{options.report}: {error}", "name another file")
            rows.append(Row("report", FAILED, "not written", "--report can be written", (unwritten,)))
    print(tell.text(rows, seconds, where), flush=True)
    is_fit = all(row.status != FAILED for row in rows)
    is_lost = all(row.status != FAILED or row.name == "alive" for row in rows)
    code = MISTAKE if here.mistake else FINISHED if is_fit else LOST if is_lost else FAILED_CODE
    board.tell("verdict", {"code": code, "lines": tell.problem_lines(rows, FAILED)})
    board.part(ranks.world - len(silent))
    return code


def follow(here: Here) -> int:
    """What rank 0 made of it; the first rank of a node repeats what concerns the node, in its own log."""
    heard = here.board.hear("verdict", times=3.0)  # rank 0 itself may wait for one that fell silent
    here.board.part(here.ranks.world)
    if heard["code"] and here.ranks.is_node_first:
        own = [line for line in heard["lines"] if f"(node {here.ranks.node}," in line]
        more = "rank 0's output has the others" if len(own) < len(heard["lines"]) else "see rank 0's output"
        print("\n".join([*own, f"preflight FAILED: {more}"]), file=sys.stderr)
    return heard["code"]


def device_of(ranks: Ranks) -> torch.device:
    """As training chooses it; the CPU where this rank's GPU is not there, which the check of GPUs tells."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or ranks.local_rank >= torch.cuda.device_count():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank)


def read_run(arguments: Sequence[str]) -> tuple[Run | None, argparse.Namespace | None, str]:
    """Run and paths as pretrain/main.py reads them, or what is wrong with them: perhaps on one node alone."""
    output = io.StringIO()
    try:
        with redirect_stderr(output), redirect_stdout(output):
            asked = read(list(arguments)) if arguments else None
            if isinstance(asked, tuple):
                return *asked, ""
    except SystemExit:
        return None, None, said(output.getvalue()) or "the arguments are wrong"
    except (ValueError, OSError) as error:
        return None, None, str(error)
    return None, None, ""


def said(text: str) -> str:
    """What is wrong, in one line, of what argparse says below its usage, or tyro in a frame with a title."""
    _, _, error = text.partition(" error: ")
    if error:
        return " ".join(error.split())
    _, *lines = [line for line in (line.strip(FRAME) for line in text.splitlines()) if line.strip("-")] or [
        ""
    ]
    return " ".join(line for line in lines if not line.startswith("For full helptext"))


if __name__ == "__main__":
    # NCCL ends a process whose partner is gone, before it could say what it saw.
    os.environ.setdefault(OURS, "0")
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a check that hangs has a thread which nothing ends

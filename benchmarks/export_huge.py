"""Does InternImage-H leave a ZeRO-3 checkpoint in every format, in ten minutes and twice the backbone, bit by bit?

python benchmarks/export_huge.py [--scratch DIR] [--formats internimage ...]      (needs 45 GB of disk, no GPU)

The checkpoint is written rank by rank with random weights, as two ranks under ZeRO-3 would. One public command
exports it to all formats: the kernel tells the highest memory of its process (pages of mapped files count), and what
it and its children hold of their own is looked at five times a second. Then for every file a process starts a run
from it by the importer and compares every tensor with the random numbers, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.record import keep  # noqa: E402
from pretrain import provenance, recipes  # noqa: E402
from pretrain.checkpoint import checkpoints_of  # noqa: E402
from pretrain.checkpoint.image import Image  # noqa: E402
from pretrain.checkpoint.names import step_name  # noqa: E402
from pretrain.checkpoint.ranges import rank_name  # noqa: E402
from pretrain.checkpoint.store import put  # noqa: E402
from pretrain.checkpoint.stores import store_at  # noqa: E402
from pretrain.config import Run  # noqa: E402
from pretrain.export.formats import EXPORTERS  # noqa: E402
from pretrain.facts import DataFacts  # noqa: E402
from pretrain.initial.asked import Init  # noqa: E402
from pretrain.initial.start import start_for  # noqa: E402
from pretrain.pretrainer import Pretrainer  # noqa: E402
from pretrain.towers import Towers  # noqa: E402

CLAIM = "a frozen random InternImage-H exports from a ZeRO-3 checkpoint of two ranks and loads back bit-identically"
RANKS, STEP = 2, 1000
MOST_SECONDS, MOST_GIB = 600, 12
MOST_BACKBONES = 2  # whose bytes are held at most, by the command and the program of a proof together
RECIPE = "m3i.internimage_h"
FACTS = DataFacts(categories=tuple(f"category {index}" for index in range(1000)), vocab_size=30522)
WRITTEN = (0, 3)  # exit codes: 3 where the toolkits themselves are not installed
GRAPHS = ("onnx",)  # no files of weights under our names


def run_of_recipe() -> Run:
    return recipes.load(RECIPE)


def random_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers for a name every time; the scale of a trained network."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).mul_(0.02)
    return values.add_(1) if len(shape) == 1 and name.endswith("weight") else values


def backbone_gib() -> float:
    """Of the weights of the backbone alone, in float32."""
    with torch.device("meta"):
        encoder = Towers(run_of_recipe(), FACTS).encoder
    return sum(one.numel() * one.element_size() for one in encoder.dcnv3.parameters()) / 2**30


def write_checkpoint(out: Path) -> int:
    """OUT/checkpoints/step_001000, without optimizer states; its bytes."""
    run = run_of_recipe()
    with torch.device("meta"):
        student, teacher = Pretrainer(run, FACTS), Towers(run, FACTS)
    store = store_at(checkpoints_of(out))
    store.begin(step_name(STEP), "0")
    partial, digests = store.unfinished(step_name(STEP), "0"), {}
    state = {
        "step": STEP,
        "position": STEP * run.batch,
        "optimizer_steps": 0,
        "world": RANKS,
        "stage": 3,
        "dtype": "torch.bfloat16",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    texts = {"run.json": run.to_json(), "facts.json": FACTS.to_json(), "state.json": json.dumps(state)}
    for whose, module in (("student", student), ("teacher", teacher)):
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        assert not [name for name in module.state_dict() if name not in shapes], (
            "H has no buffers that are kept"
        )
        parts = {name: shares(shape) for name, shape in shapes.items()}
        layout = {
            name: {"shape": shapes[name], "parts": [[r, *p] for r, p in enumerate(parts[name])]}
            for name in shapes
        }
        texts[f"{whose}/layout.json"] = json.dumps({"world": RANKS, "dtype": "float32", "parameters": layout})
        digests[f"{whose}/buffers.safetensors"] = put(partial, f"{whose}/buffers.safetensors", save({}))
        for rank in range(RANKS):
            file = f"{whose}/{rank_name(rank)}.safetensors"
            lengths, starts = ({name: part[rank][i] for name, part in parts.items()} for i in (1, 0))
            image = Image(lengths, starts, is_pinned=False)
            for name, (start, length) in ((name, part[rank]) for name, part in parts.items()):
                image.views[name].copy_(random_values(name, shapes[name]).view(-1)[start : start + length])
            digests[file] = put(partial, file, image.content)
            del image
    digests |= {name: put(partial, name, text.encode()) for name, text in texts.items()}
    store.publish(step_name(STEP), "0", digests)
    return sum(int(one["bytes"]) for one in digests.values())


def shares(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and length of every rank's part of a flattened parameter, equal but for the padding of the last."""
    numel = torch.Size(shape).numel()
    share = -(-numel // RANKS)
    return [(min(share * r, numel), min(share, numel - min(share * r, numel))) for r in range(RANKS)]


def own_memory(pid: int, parent: bytes = b"") -> int:
    """KiB that a process and its children hold now, without pages of mapped files, which can go.

    A child that has not begun its own program, and has the command line of its parent, has the pages of that one too:
    they are counted once.
    """
    held = 0
    with suppress(OSError):  # it has ended meanwhile
        process = Path(f"/proc/{pid}")
        command, told = (process / "cmdline").read_bytes(), (process / "status").read_text()
        if command == parent:
            return 0
        held += int(re.search(r"RssAnon:\s+(\d+)", told)[1]) if "RssAnon" in told else 0
        for children in process.glob("task/*/children"):
            held += sum(own_memory(int(child), command) for child in children.read_text().split())
    return held


def measured(command: list[str]) -> dict[str, Any]:
    """Exit code, seconds, seconds of processor, highest GiB and output of a process.

    `peak_gib` is its highest resident memory, `peak_own_gib` that of its own pages and of its children, looked
    at five times a second.
    """
    begun, ended, most = time.monotonic(), threading.Event(), [0]

    def look(pid: int) -> None:
        while not ended.wait(0.2):
            most[0] = max(most[0], own_memory(pid))

    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        looking = threading.Thread(target=look, args=(process.pid,))
        looking.start()
        _, status, used = os.wait4(process.pid, 0)
        ended.set()
        looking.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    return {
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "peak_own_gib": round(most[0] / 2**20, 2),
        "lines": lines,
    }


def check(file: Path) -> None:
    """Starts a run from an exported file; SystemExit unless all that it tells of has the bits of the checkpoint."""
    run = run_of_recipe()
    towers = Towers(run, FACTS)
    start = start_for(Init(file, heads=True), run, towers)
    start.fill(towers)
    state = towers.state_dict()
    differing = [
        name
        for name in start.fit.sources
        if not torch.equal(state[name], random_values(name, tuple(state[name].shape)))
    ]
    print(json.dumps({"tensors": len(start.fit.sources), "differing": differing, "told": str(start.fit)}))
    if differing or not start.fit.sources:
        sys.exit(1)


def measure(folder: Path, formats: list[str]) -> dict[str, Any]:
    """The command, of a run whose checkpoint lies in `folder`, and rows by format."""
    command = measured([sys.executable, "-m", "pretrain.export", str(folder), "--to", *formats])
    lines, rows = command.pop("lines"), {}
    print(json.dumps(command), *lines, sep="\n", flush=True)
    for name in formats:
        out = folder / "export" / name
        rows[name] = row = told_of(name, lines) | {"loaded_back": {}}
        files = json.loads((out / "keys.json").read_text())["files"] if out.exists() else {}
        for file in files if name not in GRAPHS else ():
            found = measured([sys.executable, __file__, "--check", str(out / file)])
            row["loaded_back"][file] = found | {"lines": found["lines"][-1:]}
        print(json.dumps({name: row}, indent=1), flush=True)
        shutil.rmtree(out, ignore_errors=True)
    return {"command": command, "formats": rows}


def told_of(name: str, lines: list[str]) -> dict[str, Any]:
    """What the command told of one format: its seconds, None where it was not written, and the proof."""
    begin = next(
        (i + 1 for i, line in enumerate(lines) if line.startswith(f"writes and compares {name}: ")), 0
    )
    own = lines[
        begin : next((i for i in range(begin, len(lines)) if lines[i].startswith("writes and ")), None)
    ]
    written = next((line for line in own if line.startswith("written to ")), None)
    seconds = float(re.search(r" in ([\d.]+) s;", written)[1]) if written else None
    proof = [line for line in own if line.startswith(("proven: ", "compared: "))] or own[-3:]
    return {"seconds": seconds, "proof": proof}


def main() -> None:
    """Writes the checkpoint, exports, checks, keeps the record; SystemExit when a limit is broken."""
    fitting = [name for name, exporter in EXPORTERS.items() if "internimage" in exporter.families]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--scratch", type=Path, help="folder for the checkpoint; it is removed (a temporary one)"
    )
    parser.add_argument("--formats", nargs="+", choices=fitting, default=fitting)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check is not None:
        check(options.check)
        return
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        num_bytes = write_checkpoint(Path(scratch))
        print(f"checkpoint: {num_bytes / 2**30:.2f} GiB", flush=True)
        found = measure(Path(scratch), options.formats)
    command, rows = found["command"], found["formats"]
    seconds, peak = command["seconds"], max(command["peak_gib"], command["peak_own_gib"])
    own, most_own = command["peak_own_gib"], MOST_BACKBONES * backbone_gib()
    holds = seconds < MOST_SECONDS and peak < MOST_GIB and own <= most_own
    whole = command["exit_code"] in WRITTEN and all(
        row["seconds"] is not None and all(one["exit_code"] == 0 for one in row["loaded_back"].values())
        for row in rows.values()
    )
    keep(  # some formats alone are no record of all
        "export_huge" if set(options.formats) == set(fitting) else f"export_huge_{'_'.join(options.formats)}",
        CLAIM,
        torch.device("cpu"),
        checkpoint={"gib": round(num_bytes / 2**30, 2), "ranks": RANKS, "stage": 3, "recipe": RECIPE},
        limits={"seconds": MOST_SECONDS, "gib": MOST_GIB, "own_gib": round(most_own, 2), "hold": holds},
        seconds=seconds,
        peak_gib=peak,
        is_whole=whole,
        command=command,
        formats=rows,
        load_average=[round(one, 1) for one in os.getloadavg()],
    )
    if not (holds and whole):
        sys.exit(
            f"{seconds:.0f} s, {peak:.1f} GiB, {own:.1f} of its own, whole: {whole}; the limits are {MOST_SECONDS} "
            f"s, {MOST_GIB} GiB, {most_own:.1f} of its own"
        )


if __name__ == "__main__":
    main()

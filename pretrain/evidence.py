"""What is kept of refused steps? A line each in OUT/guard.jsonl, and a bundle from which the step can be run again.

OUT/replay/step_000012-batch_000013/
    refused.json                step, batch, reasons, norm, losses; ranks, places, what was left out before
    recipe.json data.json       the run, and where its data lay
    rank_00000.safetensors      the rank's part of the batch, every tensor of it; none where there was no room
    rank_00000.json             its own losses, its host, the samples by position, source, shard and key
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save

from data_prep.files import write_atomic
from pretrain import strict_json
from pretrain.appended import Appended
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.guard import Verdict
from pretrain.host import host_name
from pretrain.intact import write_text
from pretrain.paths import Paths
from pretrain.place import Place, place_of

JOURNAL = "guard.jsonl"
BUNDLES = "replay"
REFUSED = "refused.json"
IMAGES = "has_images"  # of a rank's part: it holds the batch itself, too
MOST_BUNDLES = 16  # of a run; the oldest go first


class Rewind(NamedTuple):
    """The run went back from step `step` to the checkpoint of step `to`."""

    step: int
    to: int
    before: int  # rewinds right before it after which the run got no further
    time: float  # seconds since 1970, by which it is known


class Journal:
    """Refused steps and rewinds of a run, one line of JSON each, beside its log; for one process.

    What cannot be written is remembered all the same (pretrain/appended.py).
    """

    def __init__(self, out: Path) -> None:
        self._path = out / JOURNAL
        self._file = Appended(self._path)
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        self._lines = [line for line in map(_line, text.splitlines()) if line]
        self._before = "\n" if text and not text.endswith("\n") else ""  # a crash has cut the last line

    def clear(self) -> None:
        """The run begins from the beginning."""
        self._path.unlink(missing_ok=True)
        self._lines, self._before = [], ""

    def refused(self, verdict: Verdict, bundle: Path) -> None:
        """A step did not move the weights."""
        told = {
            "step": verdict.step,
            "batch": verdict.batch,
            "reasons": verdict.reasons,
            "norm": verdict.norm,
        }
        self._write({"event": "refused", **told, "losses": verdict.losses, "bundle": bundle.name})

    @property
    def num_refused(self) -> int:
        """Batches that were refused so far, each once."""
        return len({line["batch"] for line in self._lines if line["event"] == "refused"})

    def rewound(self, rewind: Rewind, left_out: Sequence[int]) -> None:
        """The run went back, and does without these batches from there."""
        self._write({"event": "rewound", **rewind._asdict(), "left_out": list(left_out)})

    def catch_up(self) -> None:
        """Writes what found no room, if anything."""
        self._file.write()

    def left_out(self) -> set[int]:
        """Numbers of all batches that the run does without."""
        rewound = {
            number for line in self._lines if line["event"] == "rewound" for number in line["left_out"]
        }
        return rewound | {line["batch"] for line in self._lines if line["event"] == "refused"}

    def rewinds(self) -> list[Rewind]:
        """Each time that the run went back, in their order."""
        told = (line for line in self._lines if line["event"] == "rewound")
        return [Rewind(line["step"], line["to"], line.get("before", 0), line["time"]) for line in told]

    def _write(self, told: dict[str, Any]) -> None:
        self._lines.append({"time": time.time(), **told})
        self._file.add(f"{self._before}{strict_json.dumps(self._lines[-1])}\n".encode())
        self._before = ""


def _line(text: str) -> dict[str, Any] | None:
    """None for a line that a crash damaged."""
    try:
        told = strict_json.loads(text)
        return told if isinstance(told, dict) and "event" in told else None
    except ValueError:
        return None


def bundle_of(out: Path, verdict: Verdict) -> Path:
    """Where the evidence of a refused step lies."""
    return out / BUNDLES / f"step_{verdict.step:06d}-batch_{verdict.batch:06d}"


def bundles_of(out: Path) -> list[Path]:
    """All bundles of a run, that of the newest batch first."""
    found = (out / BUNDLES).glob("step_*-batch_*")
    return sorted(found, key=lambda path: path.name.rpartition("_")[2], reverse=True)


def without_images(bundle: Path, num_bytes: int, most: float, reserve: int) -> str:
    """Why a bundle of so many bytes must do without its images; "" where it may have them.

    The images of all bundles take `most` bytes at most, and leave `reserve` free on their disk.
    """
    others = [one for one in bundles_of(bundle.parent.parent) if one != bundle][: MOST_BUNDLES - 1]
    taken = sum(path.stat().st_size for one in others for path in one.glob("rank_*.safetensors"))
    if taken + num_bytes > most:
        return (
            f"they take {num_bytes / 2**30:.2f} GiB, those of {len(others)} others {taken / 2**30:.2f}, and "
            f"guard.evidence_gib is {most / 2**30:g}: raise it, or remove bundles"
        )
    free = shutil.disk_usage(bundle.parent.parent).free
    if free - num_bytes < reserve:
        return (
            f"they take {num_bytes / 2**30:.2f} GiB, and of the {free / 2**30:.2f} that are free the next checkpoint "
            f"takes {reserve / 2**30:.2f}: free some"
        )
    return ""


def write_rank(
    bundle: Path,
    rank: int,
    batch: Batch,
    samples: list[dict[str, object]],
    losses: dict[str, float],
    *,
    has_images: bool,
) -> None:
    """This rank's part of a bundle; OSError where it cannot be written."""
    bundle.mkdir(parents=True, exist_ok=True)
    if has_images:
        tensors = {field.name: getattr(batch, field.name).cpu().contiguous() for field in fields(batch)}
        write_atomic(bundle / rank_file(rank, "safetensors"), save(tensors))
    told = {"rank": rank, "host": host_name(), "losses": losses, "samples": samples, IMAGES: has_images}
    write_text(bundle / rank_file(rank, "json"), strict_json.dumps(told, indent=1))


def write_common(
    bundle: Path,
    verdict: Verdict,
    left_out: Collection[int],
    how: Mapping[str, int],
    places: Mapping[str, Place | None],
) -> None:
    """What all ranks share, by the first one; the oldest bundles of the run go. OSError as `write_rank`.

    `left_out` before the step; `how` it was computed: "world", "micro_batches", "compile"; `places` by
    option of the command line.
    """
    bundle.mkdir(parents=True, exist_ok=True)
    for name in ("recipe.json", "data.json"):
        write_atomic(bundle / name, (bundle.parent.parent / name).read_bytes())
    told = asdict(verdict) | {"left_out": sorted(left_out)} | how
    told["places"] = {
        name: str(place.resolve()) if isinstance(place, Path) else place for name, place in places.items()
    }
    write_text(bundle / REFUSED, strict_json.dumps(told, indent=1))
    for old in bundles_of(bundle.parent.parent)[MOST_BUNDLES:]:
        shutil.rmtree(old, ignore_errors=True)


def rank_file(rank: int, suffix: str) -> str:
    """Name of a file of a rank in a bundle."""
    return f"rank_{rank:05d}.{suffix}"


def missing_from(bundle: Path, world: int) -> list[str]:
    """Names of the files that a whole bundle of so many ranks has and this one has not; each file is whole or not
    there.
    """
    names = ["recipe.json", "data.json"]
    for number in range(world):
        if has_images(bundle, number):
            names.append(rank_file(number, "safetensors"))
        names.append(rank_file(number, "json"))
    return [name for name in names if not (bundle / name).is_file()]


def has_images(bundle: Path, rank: int) -> bool:
    """Whether a rank's part holds its batch; those of older runs do, and do not say so."""
    try:
        return strict_json.loads((bundle / rank_file(rank, "json")).read_text()).get(IMAGES, True)
    except FileNotFoundError:
        return True


def read_bundle(bundle: Path) -> tuple[dict[str, Any], Run, Paths]:
    """What refused.json says, the run, and where its inputs lay; ValueError when it is no bundle, or not whole."""
    try:
        recorded = strict_json.loads((bundle / REFUSED).read_text())
    except FileNotFoundError:
        raise ValueError(f"--replay {bundle} holds no {REFUSED}: name a folder below OUT/replay") from None
    if missing := missing_from(bundle, recorded["world"]):
        raise ValueError(
            f"--replay {bundle} lacks {', '.join(missing[:3])} ({len(missing)} files in all): its run ended, or its "
            "disk was full, while it was written; name another one"
        )
    run = Run.from_json((bundle / "recipe.json").read_text())
    data = {name: place_of(place) for name, place in json.loads((bundle / "data.json").read_text()).items()}
    places: dict[str, Any] = {
        name: None if place is None else Path(place) for name, place in recorded["places"].items()
    }
    places["checkpoints"] = place_of(recorded["places"]["checkpoints"])
    how = {name: recorded[name] for name in ("micro_batches", "compile")}
    return recorded, run, Paths(data=data, out=bundle.resolve().parent.parent, **how, **places)


def read_batch(bundle: Path, rank: int) -> Batch | None:
    """The rank's part of the batch, as it was on the CPU; None where there was no room for it."""
    if not has_images(bundle, rank):
        return None
    return Batch(**load_file(bundle / rank_file(rank, "safetensors")))

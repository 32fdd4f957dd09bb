"""How is a measurement kept, and on what? As JSON that names the commit, the hardware, versions and the day."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pretrain import provenance, strict_json
from pretrain.kernels.dcnv3_choice import triton_obstacle

RESULTS = Path(__file__).resolve().parent / "results"


def gpu() -> torch.device:
    """The GPU to measure; ends the process with the reason where none can run the fused kernels."""
    if not torch.cuda.is_available():
        sys.exit(
            "no GPU is visible: nothing was measured and nothing written; run this on a machine with one"
        )
    obstacle = triton_obstacle("cuda")
    if obstacle is not None:
        sys.exit(f"the fused kernels cannot run on this GPU: {obstacle}")
    return torch.device("cuda")


def read_record(name: str) -> dict[str, Any]:
    """What `keep` wrote."""
    return strict_json.loads((RESULTS / f"{name}.json").read_text())


def measured_on(record: Mapping[str, Any], dates: Iterable[str]) -> str:
    """A sentence: on which days, on what machine and with which torch."""
    days = sorted({date[:10] for date in dates})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    return f"Measured {when} on {record['hardware']}, {threads}, torch {record['versions']['torch']}."


def shown(commits: Iterable[str]) -> str:
    """Commits in short, each once; what follows a hash, as "+changes", stays."""
    return ", ".join(f"{commit[:7]}{commit[40:]}" for commit in sorted(set(commits)))


def is_clear(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Does the 95 % interval of a row lie above that of another? Not known, and so no, where one has none."""
    if before["interval"] is None or after["interval"] is None:
        return False
    return after["interval"][0] > before["interval"][1]


def keep(name: str, claim: str, device: torch.device, **measured: object) -> None:
    """Writes benchmarks/results/<name>.json, whole or not at all, and says so. `claim`: what it is about."""
    record = {
        "claim": claim,
        "commit": provenance.commit(),
        "hardware": provenance.hardware(device),
        "cpu_model": provenance.cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(strict_json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    print(f"written to {path}")

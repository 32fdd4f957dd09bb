"""How is a measurement kept? As JSON that names the commit, the hardware, the versions and the day."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import torch

from pretrain import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def keep(name: str, claim: str, device: torch.device, **measured: object) -> None:
    """Writes benchmarks/results/<name>.json, whole or not at all, and says so. `claim`: what it is about."""
    record = {
        "claim": claim,
        "commit": provenance.commit(),
        "hardware": provenance.hardware(device),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    print(f"written to {path}")

"""Which choices does a plan compare? Files of ds_configs, kinds of activation checkpointing, micro-batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).resolve().parent.parent.parent / "ds_configs"
CHECKPOINTS = ("none", "selective", "full")  # backbone.activation_checkpoint, fastest first
Keeps = Literal["none", "selective", "full"]
# DeepSpeed's defaults for keys that a file leaves out.
DEFAULTS: dict[str, Any] = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "zero_hpz_partition_size": 1,
    "overlap_comm": None,
}


@dataclass(frozen=True)
class Setting:
    """One way to run the same mathematics."""

    file: str  # of ds_configs, without its suffix
    zero: dict[str, Any]  # section of the file
    checkpoint: Keeps = "none"
    micro_batches: int = 1
    bytes_a_weight: int = 2  # bfloat16

    def __getitem__(self, key: str) -> Any:
        return self.zero.get(key, DEFAULTS[key])

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    @property
    def is_offloaded(self) -> bool:
        return "offload_optimizer" in self.zero

    @property
    def num_buckets(self) -> int:
        """Reduction buffers: a second one fills while the first travels."""
        overlaps = self["overlap_comm"]
        return 1 + (self.stage == 3 if overlaps is None else overlaps)

    @property
    def hpz(self) -> int:
        """Ranks that hold one whole copy of the weights between them; 1: all ranks together."""
        return int(self["zero_hpz_partition_size"]) if self.stage == 3 else 1


def read(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """ZeRO section by file."""
    return {
        path.stem: json.loads(path.read_text())["zero_optimization"] for path in sorted(folder.glob("*.json"))
    }


def settings(gpus_a_node: int, gpus: int, micro_batches: tuple[int, ...] = (1,)) -> list[Setting]:
    """All of them that make sense: hpZ where there are several nodes, each of its size."""
    found = []
    for file, zero in read().items():
        hpz = int(zero.get("zero_hpz_partition_size", 1))
        if hpz > 1 and (hpz != gpus_a_node or gpus <= gpus_a_node):
            continue
        found += [Setting(file, zero, keeps, k) for keeps in CHECKPOINTS for k in micro_batches]
    return found

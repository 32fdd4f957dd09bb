"""How much of a block of InternImage-H waits in memory for the backward pass, under each choice of checkpointing?

    OMP_NUM_THREADS=1 python benchmarks/block_memory.py

One block a stage at 192 px, batch 1, float32, on the CPU: bytes that a forward pass allocates and does not free, per
value of the block's map (positions x channels), and the time of forward + backward against keeping all; turn about,
best of the rounds. Writes benchmarks/results/block_memory.json.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from pretrain import provenance  # noqa: E402
from pretrain.models.activations import CHECKPOINTS  # noqa: E402
from pretrain.models.internimage_block import Block  # noqa: E402
from pretrain.models.internimage_config import INTERNIMAGE  # noqa: E402
from pretrain.models.pooling import init_linear_and_norm  # noqa: E402

RESULT = Path(__file__).parent / "results" / "block_memory.json"
PIXELS = 192
ROUNDS = 3


def kept_values(choice: str, block: Block, x: Tensor) -> float:
    """Numbers kept a value of the map, the block's output not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        out = CHECKPOINTS[choice](block, x)
    kept = sum(event.self_cpu_memory_usage for event in measured.events()) - out.nbytes
    return kept / x.nbytes


def seconds(choice: str, block: Block, x: Tensor) -> float:
    """Of one forward and backward pass."""
    start = time.perf_counter()
    CHECKPOINTS[choice](block, x).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    config, rows = INTERNIMAGE["internimage_h"], []
    for stage, (width, stride) in enumerate(zip(config.widths, config.strides, strict=True)):
        block = Block(config, stage, drop_path=0.0).train()
        block.apply(init_linear_and_norm)
        x = torch.randn(1, PIXELS // stride, PIXELS // stride, width, requires_grad=True)
        kept = {choice: round(kept_values(choice, block, x), 2) for choice in CHECKPOINTS}
        with patch("torch.nn.functional.linear", zero3_linear_wrap):  # what DeepSpeed puts there
            kept["selective, ZeRO-3"] = round(kept_values("selective", block, x), 2)
        rounds = [{choice: seconds(choice, block, x) for choice in CHECKPOINTS} for _ in range(ROUNDS)]
        best = {choice: min(one[choice] for one in rounds) for choice in CHECKPOINTS}
        times_as_slow = {choice: round(value / best["none"], 2) for choice, value in best.items()}
        rows.append({"stage": stage + 1, "map": list(x.shape), "kept": kept, "times_as_slow": times_as_slow})
        print(rows[-1], flush=True)
    result = {
        "claim": "selective checkpointing keeps far less of a block than keeping all, full keeps the input alone",
        "unit": "numbers kept a value of the block's map; time of forward + backward relative to keeping all",
        "rows": rows,
        "commit": provenance.commit(),
        "hardware": provenance.hardware(torch.device("cpu")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()

"""Does a batch in micro-batches need less memory, and is its gradient still that of the batch?

    OMP_NUM_THREADS=1 python benchmarks/accumulation.py

M3I with category and text on the CPU, one rank: a ViT-S/16 at 64 px, a decoder of two layers, texts of two layers,
norms over the batch, drop path. Compared at k = 1, 2, 4, 8: `micro-batches`, as training takes them, and `separate`,
which is k forward and backward passes whose gradients add up, as accumulation is usually made: its images meet the
negatives and the statistics of their own part alone. Peak: bytes that autograd holds at once, parameters and batch
not counted. Error: |gradient - that of the batch at once| / |the latter|, in float32. Rounding: the same in bfloat16,
in which parts are added up too, against the float32 gradient. Time: forward + backward, processor
time of one thread, turn about, median of the rounds. Writes benchmarks/results/accumulation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.record import keep  # noqa: E402
from benchmarks.saved import peak_saved  # noqa: E402
from pretrain.balance import BalanceTracker  # noqa: E402
from pretrain.config import Run  # noqa: E402
from pretrain.data.batch import Batch  # noqa: E402
from pretrain.pretrainer import Pretrainer  # noqa: E402
from pretrain.recipes import load  # noqa: E402
from pretrain.targets import TargetEncoders  # noqa: E402
from pretrain.towers import Towers  # noqa: E402
from tests.fakes import FACTS, random_batch, shrink  # noqa: E402

IMAGES = 32
PARTS = (1, 2, 4, 8)


def benchmark_run() -> Run:
    run = shrink(load("m3i.vit_b16"))
    return replace(
        run,
        batch=IMAGES,
        backbone=replace(run.backbone, size="vit_s16", drop_path=0.1, token_norm="batch"),
        decoder=replace(run.decoder, layers=2, width=192, ffn=768, heads=4),
        pool=replace(run.pool, width=192, heads=4, norm="batch"),
        text=replace(run.text, layers=2, width=192, ffn=768, heads=4),
    )


class Bench:
    """One model, teacher and batch, differentiated as often as asked."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        run = benchmark_run()
        torch.manual_seed(0)
        self.model, self.teacher = Pretrainer(run, FACTS).to(dtype), Towers(run, FACTS).to(dtype).eval()
        self.batch = random_batch(run, IMAGES)

    def micro_batches(self, parts: int) -> None:
        self.model.micro_batches = parts
        self._backward(self.batch, 1)

    def separate(self, parts: int) -> None:
        self.model.micro_batches = 1
        columns = {f.name: getattr(self.batch, f.name).chunk(parts) for f in dataclasses.fields(self.batch)}
        for part in range(parts):
            self._backward(Batch(**{name: rows[part] for name, rows in columns.items()}), parts)

    def _backward(self, batch: Batch, parts: int) -> None:
        losses = self.model(batch, TargetEncoders(self.teacher), BalanceTracker())
        (losses.total / parts).backward()

    def gradient(self, way: str, parts: int) -> Tensor:
        """All parameters' gradients end to end, in float32."""
        self.model.zero_grad()
        getattr(self, way)(parts)
        return torch.cat([p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None])

    def measure(self, way: str, parts: int) -> tuple[Tensor, int]:
        """The gradient, and the bytes that autograd holds at once for it."""
        given = [getattr(self.batch, field.name) for field in dataclasses.fields(self.batch)]
        with peak_saved([*self.model.parameters(), *given]) as peak:
            gradient = self.gradient(way, parts)
        return gradient, peak.bytes

    def seconds(self, way: str, parts: int) -> float:
        """Of this process's processor time, which other processes do not lengthen."""
        start = time.process_time()
        self.gradient(way, parts)
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (5)")
    rounds = parser.parse_args().rounds
    bench, low = Bench(), Bench(torch.bfloat16)
    ways = [("micro_batches", parts) for parts in PARTS] + [("separate", parts) for parts in PARTS[1:]]
    whole, whole_peak = bench.measure("micro_batches", 1)
    times = [{way: bench.seconds(*way) for way in ways} for _ in range(rounds)]
    rows = []
    for way, parts in ways:
        ratios = [one[way, parts] / one["micro_batches", 1] for one in times]
        gradient, peak = bench.measure(way, parts)
        rounded = low.gradient(way, parts) if way == "micro_batches" else None
        rows.append({
            "way": way.replace("_", "-"),
            "k": parts,
            "peak_bytes": peak,
            "peak_ratio": round(peak / whole_peak, 3),
            "gradient_error": float((gradient - whole).norm() / whole.norm()),
            "rounding_in_bfloat16": None if rounded is None else float((rounded - whole).norm() / whole.norm()),
            "times_as_slow": round(statistics.median(ratios), 2),
            "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        })  # fmt: skip
        print(rows[-1], flush=True)
    keep(
        "accumulation",
        "micro-batches divide the memory of activations and leave the gradient as it is",
        torch.device("cpu"),
        images=IMAGES,
        rounds=rounds,
        unit="peak and time relative to the batch at once (k = 1)",
        rows=rows,
    )


if __name__ == "__main__":
    main()

"""How fast is a run for what the hardware could do?

Model FLOP/s are the operations that the mathematics of a step needs, a multiply-add counting as two, divided by the
time of a step: student forward once and backward twice, teacher forward once. What activation checkpointing or
accumulation computes again is not counted, nor a frozen guide (pretrain/plan/flops.py has the formula). MFU, model
FLOP/s utilisation (arXiv 2204.02311, appendix B), is their share of the peak that the maker states for the device, of
dense products in bfloat16; on a CPU, of the fastest square product that was measured at the start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pretrain.plan.machines import MACHINES

MEASURED_SECONDS = 0.2  # how long products are timed on a CPU
SIDE = 1024  # of their matrices
SLOWER = ("h100pcie", "h100nvl", "h200nvl")  # with less power than the SXM modules of plan/machines.py


@dataclass(frozen=True)
class Speed:
    """What the figures of a step are measured against."""

    flops: float  # of one step over the global batch, of the model
    world: int  # ranks, a GPU each
    peak: float | None = None  # FLOP/s of one device; None where nobody knows

    def figures(self, seconds: float) -> dict[str, float]:
        """Model FLOP/s and MFU of a step that took so long."""
        rate = self.flops / seconds / self.world
        return {"teraflops_per_gpu": rate / 1e12} | ({"mfu": rate / self.peak} if self.peak else {})

    def told(self, device: str) -> str:
        """One line for the start: the formula with its numbers."""
        against = (
            f"a peak of {self.peak / 1e12:.4g} TFLOP/s ({device})"
            if self.peak
            else f"no known peak of {device}"
        )
        return (
            f"{self.flops:.4g} FLOP a step (student 3 x forward, teacher 1 x; nothing computed twice is counted); "
            f"MFU = FLOP / (step seconds x {self.world} ranks x peak), {against}"
        )


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s in bfloat16 of a device by the name that its driver gives; None of one that is not known, in float32.

    H100 PCIe, H100 NVL and H200 NVL are slower than those of the name alone, and not known.
    """
    spoken = name.lower().replace(" ", "")  # NVIDIA GeForce RTX 4090
    if any(slower in spoken for slower in SLOWER):
        return None
    known = (machine.peak for key, machine in MACHINES.items() if key in spoken)
    return next(known, None) if dtype == torch.bfloat16 else None


def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products on this process's share of the CPU, the fastest of some."""
    left, right = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    fastest, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < MEASURED_SECONDS:
        start = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * SIDE**3 / fastest

"""Which random numbers does a process draw next, and how does a resumed one draw the same?"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch's global generators, the only randomness inside the modules, for one step of one rank."""
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of one step of one rank; in [0, 2**64), as torch's seeds are."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**64


def states() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, fit for JSON."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
    return {
        "python": [version, list(words), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": _to_hex(on_gpu),  # of this process's device; empty without
    }


def restore(saved: dict[str, Any]) -> None:
    """Sets the generators to what `states` returned; CUDA's where both had a device."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(saved["torch"]))
    if torch.cuda.is_available() and saved["cuda"]:
        torch.cuda.set_rng_state(_from_hex(saved["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)

"""How much memory does the contrastive loss of 40,000 pairs take in row chunks, against all logits at once?

    python benchmarks/contrastive_memory.py [--pairs 40000]

Forward and backward of unit vectors of width 512 in float32 on one rank, each case in a process of its own: the most
memory that the process held, less what it held with its inputs alone, and seconds. All logits at once (CLIP's loss
as written in its paper, by autograd) does not fit at 40,000: it is measured at half as many pairs and at a quarter,
and told at 40,000 as four times the former, since it grows with the square. Writes
benchmarks/results/contrastive_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import keep
from pretrain.kernels.contrastive import LOGITS, contrastive_nats

WIDTH = 512
FORMS = ("chunked", "at_once")


def at_once(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits = scale * images @ texts.T
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def held() -> int:
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(form: str, pairs: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(pairs, WIDTH, generator=generator), dim=1) for _ in range(2))
    images, texts = images.requires_grad_(), texts.requires_grad_()
    scale = torch.tensor(14.3, requires_grad=True)
    before, begun = held(), time.perf_counter()
    if form == "chunked":
        nats, _ = contrastive_nats(images, texts, torch.ones(pairs, dtype=torch.bool), scale)
    else:
        nats = at_once(images, texts, scale)
    nats.backward()
    return {
        "pairs": pairs,
        "nats": nats.item(),
        "megabytes": (held() - before) / 1e6,
        "seconds": time.perf_counter() - begun,
    }


def in_a_process(form: str, pairs: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--form", form, "--pairs", str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(form, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments.pairs)))
        return
    quarter, half, whole = (arguments.pairs // part for part in (4, 2, 1))
    small = {form: in_a_process(form, quarter) for form in FORMS}
    assert abs(small["chunked"]["nats"] - small["at_once"]["nats"]) < 1e-4, small
    half_at_once, chunked = in_a_process("at_once", half), in_a_process("chunked", whole)
    dense = 4 * half_at_once["megabytes"]
    keep(
        "contrastive_memory",
        "the contrastive loss in row chunks takes at most a twentieth of the memory of all logits at once",
        torch.device("cpu"),
        width=WIDTH,
        logits_at_once=LOGITS,
        measured={"chunked": [small["chunked"], chunked], "at_once": [small["at_once"], half_at_once]},
        at_once_megabytes_at_all_pairs=dense,
        share_of_all_at_once=chunked["megabytes"] / dense,
    )
    print(f"chunked takes 1/{dense / chunked['megabytes']:.0f} of all at once, {chunked['seconds']:.0f} s")


if __name__ == "__main__":
    main()

"""How much memory do 11,166 tags take in the tag decoder, in chunks against all at once?

    OMP_NUM_THREADS=2 python benchmarks/tag_decoder_memory.py

8 images of 14 x 14 tokens, 768 wide, the default decoder of two layers, float32, forward and backward, on a CPU: the
peak of the process above what it held after its imports, parameters and their gradients included. Every form in a
process of its own. Writes benchmarks/results/tag_decoder_memory.json.
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

from benchmarks.record import keep
from pretrain.config import Tags
from pretrain.models.tag_decoder import TagDecoder

TAGS, IMAGES, GRID, WIDTH = 11_166, 8, 14, 768
FORMS = {"chunks": Tags().chunk, "at_once": TAGS}  # tags that are decoded together


def held() -> int:
    """Bytes: the most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(form: str) -> dict[str, float]:
    """Peak and time of one step of a form, in this process."""
    before, begun = held(), time.perf_counter()
    torch.manual_seed(0)
    decoder = TagDecoder(Tags(chunk=FORMS[form]), WIDTH, TAGS)
    tokens = torch.randn(IMAGES, GRID**2, WIDTH, requires_grad=True)
    logits, similarities = decoder(tokens, None, GRID)
    (logits.mean() + similarities.mean()).backward()
    return {"gibibytes": (held() - before) / 2**30, "seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    form = parser.parse_args().form
    if form:
        print(json.dumps(measure(form)))
        return
    found = {}
    for name in FORMS:
        done = subprocess.run(
            [sys.executable, __file__, "--form", name], capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    keep(
        "tag_decoder_memory",
        "11,166 tags of 8 images take less than 4 GiB",
        torch.device("cpu"),
        tags=TAGS,
        images=IMAGES,
        tokens=GRID**2,
        width=WIDTH,
        layers=Tags().layers,
        chunk=Tags().chunk,
        measured=found,
    )


if __name__ == "__main__":
    main()

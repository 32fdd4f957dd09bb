"""How does a guide become a tokenizer? Its tokens are clustered: our own tokenizer of distilled features.

python -m pretrain.codebook GUIDE --data DIR --codes 8192 --out DIR    then --guide DIR trains with it

GUIDE is any frozen encoder that --guide takes, such as the --out folder of a run of `rows.dense_distillation_frozen`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from tqdm import tqdm

from pretrain import intact, provenance
from pretrain.command import exit_code, require_place
from pretrain.config import Run
from pretrain.data.shards import ShardFolder
from pretrain.evaluate.features import Pictures, readable
from pretrain.models.guides import Guide, open_guide
from pretrain.models.guides.guide import nearest_codes
from pretrain.models.guides.tokenizer import RECORD, copy_guide, write_codebook

TOKENS_A_CODE = 128  # unless --images says otherwise
PASSES = 5  # of the clustering over all tokens
BATCH = 4096  # tokens of one step of the clustering; at least SEEDS a code
SEEDS = 3  # tokens a code, among which k-means++ chooses the first centres
ON_DEVICE = 2**18  # tokens that a GPU holds at once
COLLAPSED = 0.5  # of the largest entropy; below it a codebook is told to be collapsed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.codebook", description=__doc__.split("\n")[0])
    parser.add_argument("guide", type=Path, metavar="GUIDE", help="folder of a frozen encoder")
    parser.add_argument("--data", type=Path, required=True, help="data set whose images are encoded")
    parser.add_argument("--codes", type=int, required=True, help="entries of the codebook, such as 8192")
    parser.add_argument("--out", type=Path, required=True, help="new folder of the tokenizer")
    parser.add_argument("--images", type=int, help=f"images, drawn at random ({TOKENS_A_CODE} tokens a code)")
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn and of the clustering (0)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    return parser.parse_args(arguments)


def make_codebook(arguments: list[str] | None = None) -> dict[str, Any]:
    """Writes a tokenizer, whole or not at all, and prints how evenly its codes are used; returns its record.

    The tokens are held in memory, 4 bytes a number: 3.2 GB for 8192 codes of width 768. Raises ValueError and
    OSError for what the user can mend, in the first seconds but for unreadable images.
    """
    options = parse(arguments)
    if options.out.exists():
        raise FileExistsError(f"--out {options.out} exists: name a new folder, or delete it")
    require_place("--out", options.out)
    if options.seed < 0:
        raise ValueError(f"--seed {options.seed} must not be negative")
    if options.codes < 2:
        raise ValueError(f"--codes {options.codes} must be at least 2")
    data = ShardFolder(options.data)
    guide = open_guide(options.guide)
    if guide.num_codes:
        raise ValueError(
            f"{options.guide} is a tokenizer of {guide.num_codes} codes: name the guide it was made of"
        )
    samples = choose_images(len(data), guide.grid, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dropped: Counter[str] = Counter()
    pictures = Pictures(options.data, guide.grid * guide.patch, samples)
    tokens = encode(guide.to(device), pictures, dropped, options.workers)
    check_codes(options.codes, len(tokens), len(samples), guide.grid)
    centres = cluster(tokens, options.codes, options.seed)
    codebook, num_reseeded = reseed_empty(tokens, centres, device)
    record = {
        "codes": options.codes,
        "images": len(samples) - sum(dropped.values()),
        "tokens": len(tokens),
        "grid": guide.grid,
        "width": guide.width,
        "seed": options.seed,
        **usage(tokens, codebook, device),
        "reseeded": num_reseeded,
        "dropped": dict(dropped),
        "source": {"name": data.manifest.name, "split": data.manifest.split, "manifest_sha256": data.sha256},
        "guide_sha256": guide.sha256,
        "commit": provenance.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(device),
    }
    write(options.out, guide, codebook, record)
    print(summary(record))
    print(f"written to {options.out}")
    return record


def choose_images(num_samples: int, grid: int, options: argparse.Namespace) -> list[int]:
    """Numbers of the samples that are encoded, in order; ValueError when they are too many or too few."""
    wanted = options.images
    if wanted is None:
        wanted = min(math.ceil(TOKENS_A_CODE * options.codes / grid**2), num_samples)
    if not 1 <= wanted <= num_samples:
        raise ValueError(f"--images {wanted} must lie in [1, {num_samples}], the images of {options.data}")
    check_codes(options.codes, wanted * grid**2, wanted, grid)
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randperm(num_samples, generator=generator)[:wanted].sort().values.tolist()


def check_codes(num_codes: int, num_tokens: int, num_images: int, grid: int) -> None:
    if num_codes > num_tokens:
        raise ValueError(
            f"--codes {num_codes} must be at most {num_tokens}, the tokens of {num_images} images of "
            f"{grid} x {grid}: give fewer codes or more images"
        )


@torch.no_grad()
def encode(guide: Guide, pictures: Pictures, dropped: Counter[str], workers: int) -> Float32[Tensor, "t d"]:
    """Tokens of all readable images as unit vectors, on the CPU; the unreadable are counted in `dropped`."""
    device, tokens = next(guide.parameters()).device, []
    for good in readable(pictures, dropped, limit=Run.max_bad, workers=workers, title="encodes"):
        views = torch.stack([picture.view for picture in good]).to(device)
        tokens.append(F.normalize(guide(views, guide.grid)[:, 1:].flatten(0, 1), dim=-1).cpu())
    return torch.cat(tokens)


def cluster(tokens: Float32[Tensor, "t d"], num_codes: int, seed: int) -> Float32[Tensor, "k d"]:
    """Centres of the tokens as unit vectors, by scikit-learn's MiniBatchKMeans begun with k-means++."""
    means = MiniBatchKMeans(num_codes, random_state=seed, compute_labels=False)
    shuffle = np.random.default_rng(seed)
    batches = max(len(tokens) // max(BATCH, SEEDS * num_codes), 1)
    with tqdm(total=PASSES * len(tokens), desc="clusters", unit=" token", unit_scale=True) as bar:
        for _ in range(PASSES):
            for rows in np.array_split(shuffle.permutation(len(tokens)), batches):
                means.partial_fit(tokens[torch.from_numpy(rows)].numpy())
                bar.update(len(rows))
    return F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=-1)


def reseed_empty(
    tokens: Float32[Tensor, "t d"], centres: Float32[Tensor, "k d"], device: torch.device
) -> tuple[Float32[Tensor, "k d"], int]:
    """Puts every centre that is nearest to no token where the tokens are that lie farthest from theirs."""
    codes, cosines = _look_up(tokens, centres, device)
    empty = (torch.bincount(codes, minlength=len(centres)) == 0).nonzero()[:, 0]
    codebook = centres.clone()
    codebook[empty] = tokens[cosines.topk(len(empty), largest=False).indices]
    return codebook, len(empty)


def usage(
    tokens: Float32[Tensor, "t d"], codebook: Float32[Tensor, "k d"], device: torch.device
) -> dict[str, float | int]:
    """How evenly the codes are used, entropy in nats (at most ln codes), and how near they are to the tokens."""
    codes, cosines = _look_up(tokens, codebook, device)
    counts = torch.bincount(codes, minlength=len(codebook)).double()
    return {
        "used": int((counts > 0).sum()),
        "entropy": torch.special.entr(counts / counts.sum()).sum().item(),
        "largest_entropy": math.log(len(codebook)),
        "mean_cosine": cosines.double().mean().item(),
    }


def _look_up(
    tokens: Float[Tensor, "t d"], codebook: Float[Tensor, "k d"], device: torch.device
) -> tuple[Int[Tensor, " t"], Float32[Tensor, " t"]]:
    """As nearest_codes, in parts that a GPU holds; results on the CPU."""
    found = [nearest_codes(part.to(device), codebook.to(device)) for part in tokens.split(ON_DEVICE)]
    codes, cosines = zip(*found, strict=True)
    return torch.cat([part.cpu() for part in codes]), torch.cat([part.cpu() for part in cosines])


def write(out: Path, guide: Guide, codebook: Float32[Tensor, "k d"], record: dict[str, Any]) -> None:
    """The tokenizer's folder, whole or not at all."""
    out = intact.followed(out)
    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        copy_guide(guide, partial)
        write_codebook(partial, codebook)
        intact.write_text(partial / RECORD, json.dumps(record, indent=1) + "\n")
        intact.publish(partial, out, intact.digest(partial, intact.files_in(partial)))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def summary(record: dict[str, Any]) -> str:
    """What the codebook is worth, in words."""
    lines = [
        f"{record['codes']:,} codes of {record['tokens']:,} tokens of {record['images']:,} images; "
        f"{record['reseeded']:,} clusters were empty and got a token far from its own",
        f"usage entropy {record['entropy']:.2f} of {record['largest_entropy']:.2f} nats, {record['used']:,} codes "
        f"are used; mean cosine to the nearest code {record['mean_cosine']:.3f}",
    ]
    if record["entropy"] < COLLAPSED * record["largest_entropy"]:
        lines.append(
            "warning: most tokens share a few codes, the codebook is collapsed: do the guide's tokens differ?"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message."""
    return exit_code(make_codebook, arguments)


if __name__ == "__main__":
    sys.exit(main())

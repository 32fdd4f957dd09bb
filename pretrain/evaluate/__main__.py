"""How good are the teacher's features on held-out images, before and after pre-training?

python -m pretrain.evaluate RUN --data DIR        DIR/train gives the probes their examples, DIR/heldout tests them
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from data_prep.schema import Manifest
from pretrain import provenance
from pretrain.checkpoint import load_towers
from pretrain.data.text import Captions
from pretrain.evaluate import result
from pretrain.evaluate.checkpoints import find_checkpoint
from pretrain.evaluate.features import extract
from pretrain.evaluate.probes import Evidence, measure

SPLITS = ("train", "heldout")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pretrain.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out folder of a pre-training run")
    parser.add_argument("--data", type=Path, help="folder of the data sets train/ and heldout/")
    parser.add_argument("--train", type=Path, help="data set of the examples, in place of DATA/train")
    parser.add_argument("--heldout", type=Path, help="data set of the tests, in place of DATA/heldout")
    parser.add_argument(
        "--steps", default="first,last", help="checkpoints: first, last, numbers (first,last)"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result (RUN/evaluation.json)")
    parser.add_argument("--k", type=int, default=20, help="neighbours of kNN (20)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (0: this one)")
    return parser.parse_args(arguments)


def evaluate(arguments: list[str] | None = None) -> dict[str, Any]:
    """Evaluates, writes the JSON result and prints the table; returns the result.

    Raises FileNotFoundError and ValueError for what the user can mend, before any image is read.
    """
    options = parse(arguments)
    folders = split_folders(options.data, options.train, options.heldout)
    manifests = {split: Manifest.read(folder) for split, folder in folders.items()}
    check_manifests(folders, manifests, options.k)
    steps = [find_checkpoint(options.run, name.strip()) for name in options.steps.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluated: dict[str, Any] = {"checkpoints": {}}
    for step in dict.fromkeys(steps):  # each once: of a run's beginning the first is the last
        run, evidence = gather(step, folders, manifests, options, device)
        outcomes = measure(evidence)
        evaluated |= result.header(run, folders, manifests, provenance.hardware(device))
        evaluated["checkpoints"][step.name] = result.of_checkpoint(evidence, outcomes)
        evaluated["confusion"] = result.confusion(step.name, evidence, outcomes)
        evaluated["neighbours"] = result.neighbours(step.name, evidence)
    out = options.out or options.run / "evaluation.json"
    result.write(out, evaluated)
    print(result.table(evaluated))
    print(f"written to {out}")
    return evaluated


def gather(
    step: Path,
    folders: dict[str, Path],
    manifests: dict[str, Manifest],
    options: argparse.Namespace,
    device: torch.device,
) -> tuple[Any, Evidence]:
    """The run and the features of both data sets under the teacher of one checkpoint."""
    run, facts, towers = load_towers(step)
    towers.to(device)
    train, heldout = (
        extract(
            towers, run, folders[split], device=device, workers=options.workers, title=f"{step.name} {split}"
        )
        for split in SPLITS
    )

    @torch.inference_mode()
    def embed(tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return towers.embed_texts(tokens.to(device), token_mask.to(device))

    return run, Evidence(
        train=train,
        heldout=heldout,
        categories=manifests["heldout"].categories,
        facts=facts,
        k=options.k,
        encode=Captions(step / "tokenizer", run.text.length).encode if facts.vocab_size else None,
        embed=embed,
    )


def split_folders(data: Path | None, train: Path | None, heldout: Path | None) -> dict[str, Path]:
    """The two data sets that the command line names."""
    named = {"train": train, "heldout": heldout}
    for split in SPLITS:
        if named[split] is None and data is None:
            raise ValueError(
                f"no {split} data set is named: give --data DIR with train/ and heldout/, or --{split}"
            )
        named[split] = named[split] or data / split
        if not named[split].is_dir():
            raise FileNotFoundError(
                f"{named[split]} is no folder: `python -m data_prep build` writes train/ and heldout/, "
                f"or name a data set by --{split}"
            )
    if named["train"].resolve() == named["heldout"].resolve():
        raise ValueError(
            f"--train and --heldout are both {named['train']}: accuracy on images that the probes have seen says "
            "nothing; name two data sets"
        )
    return named


def check_manifests(folders: dict[str, Path], manifests: dict[str, Manifest], k: int) -> None:
    train, heldout = (manifests[split] for split in SPLITS)
    if train.categories != heldout.categories:
        odd = sorted(set(train.categories) ^ set(heldout.categories)) or ["the same names in another order"]
        raise ValueError(
            f"{folders['train']} has {len(train.categories)} categories, {folders['heldout']} has "
            f"{len(heldout.categories)}, and they must be the same (differing: {odd[:5]}): build both splits "
            "from one source"
        )
    if not train.categories and not heldout.has_text:
        raise ValueError(
            f"{folders['heldout']} has neither categories nor captions, so there is nothing to measure: "
            "name another data set"
        )
    if not 1 <= k <= train.num_samples:
        raise ValueError(f"--k {k} must lie in [1, {train.num_samples}], the images of {folders['train']}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message."""
    try:
        evaluate(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

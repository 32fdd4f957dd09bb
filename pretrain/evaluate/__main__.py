"""How good are the teacher's features on held-out images, before and after pre-training?

python -m pretrain.evaluate RUN --data DIR        DIR/train gives the probes their examples, DIR/heldout tests them
    --probes all                                  everything that reads features once, with few labels too
    --probes linear_paper,attentive_crops         heads trained on fresh crops, the first by the paper's recipe
    --fine-tune [EPOCHS] [--few-shot]             the whole encoder too, trained on the categories [and on few labels]

RUN is a run, one of its checkpoints, or an exported or published model (every format of pretrain.export, timm,
Hugging Face, open_clip). DIR/train and DIR/heldout are data sets of `data_prep`, or folders with one folder of images
a class. Several ranks share images and probes: torchrun --nproc-per-node 8 -m pretrain.evaluate RUN --data DIR
"""

from __future__ import annotations

import argparse
import sys

from pretrain.command import exit_code_of_words
from pretrain.evaluate.arguments import parse, protocols_of, split_folders

INTERRUPTED = "measured checkpoints are in the result, if any; the same command goes on with a training"


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message, of several ranks by the first."""
    if code := exit_code_of_words(lambda given: _check(parse(given)), arguments, INTERRUPTED):
        return code
    import torch

    from pretrain.evaluate.evaluation import evaluate
    from pretrain.evaluate.shares import TIMEOUT
    from pretrain.ranks import exit_code_of_ranks

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return exit_code_of_ranks(evaluate, arguments, INTERRUPTED, TIMEOUT, backend)


def _check(options: argparse.Namespace) -> None:
    protocols_of(options)
    split_folders(options.data, options.train, options.heldout)


if __name__ == "__main__":
    sys.exit(main())

"""What is a run's backbone worth for segmentation and detection?

python -m pretrain.transfer segment RUN --data DIR     UperNet: mean IoU
python -m pretrain.transfer detect RUN --data DIR      Mask R-CNN or RT-DETR: box and mask AP

Several ranks share each batch and the test: torchrun --nproc-per-node 8 -m pretrain.transfer segment RUN --data DIR
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from pretrain.command import exit_code_of_words
from pretrain.transfer.arguments import parse, recipe_of

TIMEOUT = timedelta(minutes=30)  # of a rank that the others wait for
LEFT = "the same command goes on from the last state that was kept, if any"


def run(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Trains and tests, writes the JSON result and prints the table; returns the result, on several ranks the first.

    Raises FileNotFoundError and ValueError for what the user can mend, before the first step.
    """
    from pretrain.transfer.asked import transferred  # takes seconds

    return transferred(parse(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Exit code. A mistake of the user's is told in one message, of several ranks by the first."""
    if code := exit_code_of_words(lambda given: recipe_of(parse(given)), arguments, LEFT):
        return code
    import torch

    from pretrain.ranks import exit_code_of_ranks

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return exit_code_of_ranks(run, arguments, LEFT, TIMEOUT, backend)


if __name__ == "__main__":
    sys.exit(main())

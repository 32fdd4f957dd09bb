"""What will a run need of a cluster, and how is it started there?

python -m pretrain.plan --recipe m3i.internimage_h --gpus 64 --gpu h200 --network 50 [--gpus-per-node 8] [--price 3]
    [--micro-batches 1 2 4] [--categories N] [--vocab N] [--tags N] [overrides of the recipe: --batch 20000]

Needs neither GPU nor data. Names the fastest setting that fits, of every file in ds_configs/ with every choice
of activation checkpointing, and prints its command. Memory and traffic are checked against real steps, time is
simulated.
"""

from __future__ import annotations

import argparse
import sys

from pretrain import recipes
from pretrain.arguments import override
from pretrain.command import exit_code
from pretrain.config import Run
from pretrain.plan.machines import MACHINES, Cluster

MICRO_BATCHES = (1, 2, 4, 8, 16)  # tried, as far as they divide the inputs of a GPU


def parse(arguments: list[str] | None) -> tuple[Run, Cluster, argparse.Namespace, list[str]]:
    """Run, cluster, options and overrides; ValueError, or SystemExit after argparse has told it."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.plan",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(recipes.names())}")
    parser.add_argument("--gpus", type=int, required=True, help="ranks of the run")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(MACHINES)}")
    parser.add_argument(
        "--network", type=float, required=True, help="GB/s of a GPU to other nodes: 50 for 400 Gb/s a GPU"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(8)")
    parser.add_argument("--price", type=float, help="of a GPU-hour, in any currency")
    parser.add_argument("--micro-batches", type=int, nargs="+", help=f"to try ({MICRO_BATCHES})")
    parser.add_argument("--categories", type=int, default=1000, help="of the data (1000)")
    parser.add_argument("--vocab", type=int, default=30_522, help="of the tokenizer (30522)")
    parser.add_argument("--tags", type=int, default=8000, help="of the data (8000)")
    options, overrides = parser.parse_known_args(arguments)
    cluster = Cluster(options.gpu, options.gpus, options.network * 1e9, options.gpus_per_node)
    for name in ("price", "categories", "vocab", "tags"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"--{name} {value} must be positive")
    run = recipes.load(options.recipe)
    if overrides:
        run = override(run, overrides)
    images = run.images_per_rank(cluster.gpus)
    if options.micro_batches is None:
        inputs = images // run.objective.input.mixed
        options.micro_batches = [num for num in MICRO_BATCHES if inputs % num == 0]
    return run, cluster, options, overrides


def plan(arguments: list[str] | None) -> None:
    """Prints the plan. ValueError and OSError: a mistake of the user's."""
    run, cluster, options, overrides = parse(arguments)
    from pretrain.plan.plan import make_plan  # here: torch takes seconds, and mistakes are told before
    from pretrain.plan.sizes import assumed_facts
    from pretrain.plan.tell import tell

    facts = assumed_facts(run, options.categories, options.vocab, options.tags)
    made = make_plan(run, facts, cluster, tuple(options.micro_batches))
    print(tell(made, options.recipe, overrides, options.price))


def main(arguments: list[str] | None = None) -> int:
    """Exit code; a mistake of the user's is told in one message."""
    return exit_code(plan, arguments)


if __name__ == "__main__":
    sys.exit(main())

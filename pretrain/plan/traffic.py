"""What do the ranks send in one step? Every collective by what it is for, in bytes of the whole message.

Counted on a run's own collectives these are right within 1 %. ZeRO-1 and 2 of DeepSpeed 0.19 sum gradients by an
all-reduce, which carries each byte twice, and gather weights once after the step; ZeRO-3 gathers the weights of a
module before its forward pass, and before its backward pass where they were released, and scatters the sums of
gradients; with micro-batches it does so for each, and once more for the second forward pass. What the losses exchange
is float32 and small beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.plan.flops import IMAGE_EMBEDDED, LABEL_EMBEDDED, grid_of, kinds_of, share_of, width_of
from pretrain.plan.settings import Setting
from pretrain.plan.sizes import Sizes
from pretrain.served import active_targets

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
FLOAT32 = 4
SCALARS = 20  # about as many: norms and counts of gradients, balance, verdict on the step
SCALAR_CALLS = 5
CONTRASTIVE_WORDS = 1 + 8 + 4 + 4  # bytes an image: has a text, the text's number, both log-sum-exps


@dataclass(frozen=True)
class Message:
    """What one purpose sends in a step, over all its calls."""

    what: str  # gradients, weights before forward, weights before backward, weights after the step, teacher, losses
    by: Collective
    bytes: float  # of the whole: what a gather gives to every rank, what a reduction takes from every rank
    calls: float
    within: int | None = None  # ranks that take part, where they are not all

    def on_wire(self, ranks: int) -> float:
        """Bytes that a rank sends, by the ring algorithm."""
        size = self.within or ranks
        return self.bytes * (size - 1) / size * (2 if self.by == "all_reduce" else 1)


def traffic(run: Run, facts: DataFacts, sizes: Sizes, setting: Setting, ranks: int) -> list[Message]:
    """Of one optimizer step; empty on one rank."""
    if ranks == 1:
        return []
    weights = (
        _divided(run, facts, sizes, setting, ranks) if setting.stage == 3 else _whole(sizes, setting, ranks)
    )
    return [*weights, *_losses(run, facts)]


def _whole(sizes: Sizes, setting: Setting, ranks: int) -> list[Message]:
    wide, trained = setting.bytes_a_weight, sizes.num_trained
    buckets = -(-trained // setting["reduce_bucket_size"])
    return [
        Message("gradients", "all_reduce", trained * wide, buckets),
        Message("weights after the step", "all_gather", trained * wide, 2),
        Message("teacher", "all_gather", sizes.longest_share(ranks) * ranks * wide, 1),
    ]


def _divided(run: Run, facts: DataFacts, sizes: Sizes, setting: Setting, ranks: int) -> list[Message]:
    wide, threshold = setting.bytes_a_weight, setting["stage3_param_persistence_threshold"]

    def padded(parameters: tuple[int, ...], resident: bool = False) -> float:
        return wide * sum(-(-n // ranks) * ranks for n in parameters if (n <= threshold) == resident)

    targets, parts = active_targets(run, facts).values(), setting.micro_batches
    decoded = sum(target.is_decoded for target in targets)
    again = max(decoded - 1, 0)  # calls of the decoder after the first
    forward, decoder, joint = padded(sizes.trained), padded(sizes.decoder), padded(sizes.joint)
    is_kept = (
        sizes.num_trained <= setting["stage3_max_live_parameters"]
    )  # as pretrain/plan/memory.py's `live` says
    if not is_kept:
        forward += again * decoder
        apart = forward - joint  # what each micro-batch needs
        forward = parts * apart + joint
    calls = forward / wide / setting["stage3_prefetch_bucket_size"]
    whole = wide * sum(-(-n // ranks) * ranks for n in sizes.trained)
    taught = parts * wide * sum(-(-n // ranks) * ranks for n in sizes.taught)
    found = [
        Message("weights before forward", "all_gather", forward, calls),
        Message("gradients", "reduce_scatter", whole, whole / wide / setting["reduce_bucket_size"]),
        Message("weights after the step", "all_gather", padded(sizes.trained, resident=True), 1),
        Message("teacher", "all_gather", taught, taught / wide / setting["stage3_prefetch_bucket_size"]),
    ]
    if not is_kept:
        near = setting.hpz if setting.hpz > 1 else None
        # DeepSpeed releases a module when its input's gradient is there: one without stays for the next call.
        backward = forward - max(decoded * parts - 1, 0) * padded(sizes.geometry)
        backward += (
            parts * apart * (parts > 1)
        )  # for the second forward pass, which comes with the backward pass
        found.append(
            Message("weights before backward", "all_gather", backward, calls * backward / forward, near)
        )
    return [message for message in found if message.bytes]


def _losses(run: Run, facts: DataFacts) -> list[Message]:
    """What targets and norms exchange, whatever the ZeRO stage."""
    targets = active_targets(run, facts)
    images, kinds = run.batch * run.objective.input.views, kinds_of(targets)
    gathered = [_gathered(run, target, images) for target in targets.values()]
    norms = [width_of(run.backbone)] * (run.backbone.token_norm == "batch")
    sides = bool(kinds & set(LABEL_EMBEDDED)) + bool(kinds & set(IMAGE_EMBEDDED))
    norms += [run.pool.width] * (run.pool.norm == "batch") * sides
    if "global" in kinds:
        norms += [run.projection.hidden, run.projection.width] * 2
    if "clusters" in kinds:
        norms += [run.clusters.hidden, run.clusters.width]
    summed = 2 * 2 * FLOAT32 * sum(norms)  # mean and square, forward and backward
    clusters = 2 * run.clusters.iterations * run.clusters.prototypes * FLOAT32 * ("clusters" in kinds)
    found = [
        Message("losses", "all_gather", sum(gathered), 6 * sum(map(bool, gathered))),
        Message("norms and clusters", "all_reduce", summed + clusters, 2 * len(norms)),
        Message("scalars", "all_reduce", SCALARS * FLOAT32, SCALAR_CALLS),
    ]
    return [message for message in found if message.bytes]


def _gathered(run: Run, target, images: int) -> float:
    rows = images * share_of(run, target)
    if target.kind == "text":
        return rows * (2 * run.pool.width * FLOAT32 + CONTRASTIVE_WORDS)
    if target.kind == "global" and target.score == "boltzmann":
        return rows * run.projection.width * FLOAT32
    if target.kind == "dense" and target.score == "boltzmann" and target.encoder == "ema":
        return rows * min(run.projection.dense_samples, grid_of(run) ** 2) * width_of(run.backbone) * FLOAT32
    return 0.0

"""How many bytes does a rank need, and for what?

Weights, gradients and optimizer as DeepSpeed 0.19 lays them out: ZeRO-1 keeps whole gradients until the step,
ZeRO-2 and 3 this rank's share, ZeRO-3 shares of the weights too; hpZ keeps a second copy of the weights, divided
over a node, from a step's forward pass to its end. The teacher is whole in the model's precision under ZeRO-1 and 2,
beside the buffer that exchanges it, and divided under ZeRO-3; its average is float32 shares everywhere. Two moments
compete for the peak: the backward pass with all that waits for it, and the optimizer's step with its gradients in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.kernels.contrastive import LOGITS
from pretrain.plan.activations import Kept, kept
from pretrain.plan.settings import Setting
from pretrain.plan.sizes import Sizes
from pretrain.served import active_targets

MASTER, MOMENTS = 4, 8  # bytes a parameter, float32
VIEWS = 2  # of every image, uint8 on the device


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part."""

    weights: float
    gradients: float
    optimizer: float  # float32 masters and two moments
    teacher: float
    average: float  # the teacher's, float32
    buffers: float  # buckets of reduction, and weights that ZeRO-3 has gathered
    activations: float
    working: float  # of the largest layer's backward pass, recomputed block, contrastive logits
    step: float  # of the optimizer's step alone: gradients in float32
    resident: float = 0.0  # of gradients and buffers, what stays between steps
    host: float = 0.0  # of the rank's host, where the optimizer is offloaded

    @property
    def at_rest(self) -> float:
        """Between two steps."""
        return self.weights + self.optimizer + self.teacher + self.average + self.resident

    @property
    def backward(self) -> float:
        """The most on the device until the optimizer's step."""
        added = self.gradients + self.buffers + self.activations + self.working - self.resident
        return self.at_rest + added

    @property
    def peak(self) -> float:
        """The most on the device."""
        return max(self.backward, self.at_rest + self.step)


def memory(
    run: Run, facts: DataFacts, sizes: Sizes, setting: Setting, ranks: int, *, is_fused: bool = True
) -> Memory:
    """Of one of `ranks`; `is_fused`: by the kernels of a GPU."""
    wide, images = setting.bytes_a_weight, run.images_per_rank(ranks)
    of_image = kept(run, facts, setting.checkpoint, is_fused=is_fused, bytes_a_number=wide)
    trained, averaged = sizes.num_trained, sizes.num_averaged
    shares = sum(-(-n // ranks) for n in sizes.trained)
    bucket = min(setting["reduce_bucket_size"], trained) * wide
    optimizer = (MASTER + MOMENTS) * trained / ranks
    averages = averaged / ranks if setting.stage == 3 else sizes.longest_share(ranks)
    temporary = 0 if is_fused else MOMENTS  # of AdamW in single operations, as on the CPU
    common = {
        "average": MASTER * averages,
        "activations": activations(run, of_image, images, setting),
        "working": working(run, facts, of_image, images, setting, ranks),
        # Where the optimizer is offloaded, its host has gradients of both kinds all the time.
        "step": ((0 if setting.is_offloaded else MASTER + wide) + temporary) * trained / ranks,
        "optimizer": 0.0 if setting.is_offloaded else optimizer,
        "host": optimizer + (MASTER + wide) * trained / ranks if setting.is_offloaded else 0.0,
    }
    if setting.stage < 3:
        exchanged = sizes.longest_share(ranks) * ranks * wide if ranks > 1 else 0
        return Memory(
            weights=trained * wide,
            gradients=trained * wide / (ranks if setting.stage == 2 and setting.micro_batches == 1 else 1),
            teacher=averaged * wide + exchanged,
            buffers=bucket * (setting.num_buckets + (ranks > 1)),
            **common,
        )
    resident = sum(n for n in sizes.trained if n <= setting["stage3_param_persistence_threshold"])
    gradients = share = 0.0 if setting.is_offloaded else shares * wide
    if setting.micro_batches > 1:  # ranks reduce the sum over all parts, which each holds whole until then
        gradients = trained * wide
    secondary = trained / setting.hpz if setting.hpz > 1 else 0
    return Memory(
        weights=(shares + resident) * wide,
        gradients=gradients,
        resident=share + bucket,
        teacher=sum(-(-n // ranks) for n in sizes.towers) * wide,
        buffers=bucket * (setting.num_buckets + 1) + (live(sizes, setting, ranks) + secondary) * wide,
        **common,
    )


def live(sizes: Sizes, setting: Setting, ranks: int) -> float:
    """Parameters that ZeRO-3 holds gathered at the most, beside those that always are."""
    if ranks == 1:
        return 0.0
    threshold = setting["stage3_param_persistence_threshold"]

    def divided(numbers: Sequence[int]) -> int:
        return sum(n for n in numbers if n > threshold)

    gathered = divided(sizes.trained)
    if setting.micro_batches > 1:  # what saw the whole batch is released before the gradients are all there
        gathered -= divided(sizes.joint) + divided(sizes.decoder)
    # Each module fetches a bucket more, until so many are live, and what it has fetched or met on the way for later
    # use is not released, whatever stage3_max_reuse_distance says.
    most = max(
        setting["stage3_max_live_parameters"], sizes.largest_unit + setting["stage3_prefetch_bucket_size"]
    )
    return min(gathered, most)


def activations(run: Run, of_image: Kept, images: int, setting: Setting) -> float:
    """Bytes that wait for the backward pass: of the encoders of one micro-batch, of heads and decoders of them all.

    With micro-batches, tokens and text vectors of all wait with their gradients.
    """
    part = math.ceil(images / setting.micro_batches)
    encoders = part * (of_image.encoder + of_image.text)
    waiting = images * VIEWS * 3 * run.views.size**2  # the batch itself
    return setting.bytes_a_weight * (encoders + images * (of_image.decoder + of_image.heads)) + waiting


def working(run: Run, facts: DataFacts, of_image: Kept, images: int, setting: Setting, ranks: int) -> float:
    """Bytes that come and go: of a layer, of a block that is computed again, and of the contrastive softmax."""
    part = math.ceil(images / setting.micro_batches)
    block = 0.0 if setting.checkpoint == "none" else of_image.block
    layers = setting.bytes_a_weight * part * (of_image.working + block)
    if not any(target.kind == "text" for target in active_targets(run, facts).values()):
        return layers
    logits = 3 * 4 * min(LOGITS, images * run.batch)
    return max(layers, logits) + 2 * 4 * run.batch * run.pool.width  # gathered features wait as well

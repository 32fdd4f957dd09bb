"""How long will a step take? A simulation: arithmetic at a measured share of the peak, messages by alpha and beta.

Measured: EFFICIENCY, on an H200 by benchmarks/m3i_step_gpu.py, for InternImage-H and ViT-B alike. Assumed, and told
by `ASSUMPTIONS`: everything else. Nothing here was measured on more than one GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.plan.flops import BACKWARD
from pretrain.plan.machines import ATTAINED_LINK, ATTAINED_MEMORY, ATTAINED_NETWORK, ATTAINED_PCIE, Cluster
from pretrain.plan.settings import Setting
from pretrain.plan.sizes import Sizes
from pretrain.plan.traffic import Message

# Model FLOPs over peak in a step of one H200 without optimizer and average: matrix products at about 0.6 of the
# peak, and as much time again in DCNv3, norms and other kernels that move memory.
EFFICIENCY = 0.324
AGAIN = {"none": 0.0, "selective": 0.3, "full": 1.0}  # of the encoder's forward pass, computed again; assumed
LATENCY = 20e-6  # seconds of a collective call
HOP = 5e-6  # seconds more for each doubling of the nodes
OVERLAP = 0.8  # of the arithmetic beside it, what a message can hide behind
HOST_ADAM = 3e8  # parameters a second that a rank's share of the host's cores updates
OPTIMIZER_BYTES = 4 + 2 + 7 * 4 + 2  # a parameter: gradient twice, master and moments in and out, weight
AVERAGE_BYTES = 3 * 4 + 2  # a parameter: master, average in and out, the teacher's weight

ASSUMPTIONS = (
    f"arithmetic reaches {EFFICIENCY} of the GPU's bfloat16 peak, as measured on one H200 (InternImage-H and ViT-B); "
    "other GPUs, backbones and fewer images a GPU are assumed to reach as much",
    f"computed again: {AGAIN['selective']} of the encoder's forward pass with selective checkpointing, all of it "
    "with full; micro-batches encode images and texts, and decode, once more",
    f"ring collectives at {ATTAINED_LINK} of the link's and {ATTAINED_NETWORK} of the network's bandwidth, whose "
    f"GPUs all send at once; {LATENCY * 1e6:g} us a call and {HOP * 1e6:g} us for each doubling of the nodes",
    f"what overlaps hides behind {OVERLAP} of the arithmetic that runs beside it: gradients behind the backward "
    "pass where overlap_comm is on, ZeRO-3's weights behind the pass that needs them; the rest waits",
    f"optimizer and average stream {OPTIMIZER_BYTES} and {AVERAGE_BYTES} bytes a parameter at {ATTAINED_MEMORY} of "
    f"the memory's bandwidth; offloaded, the host updates {HOST_ADAM:g} parameters a second a rank",
    "data is always ready, and no rank is slower than another",
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    forward: float  # of student and teacher
    backward: float  # with what is computed again
    exposed: float  # communication that nothing hides
    optimizer: float  # and average
    hidden: float  # communication behind arithmetic: no part of the step

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exposed + self.optimizer


def step_time(
    flops: dict[str, float], sizes: Sizes, setting: Setting, messages: list[Message], cluster: Cluster
) -> StepTime:
    """`flops` as `pretrain.plan.flops.parts` gives them, of the global batch."""
    rate = EFFICIENCY * cluster.one.peak * cluster.gpus
    once = 1 / (1 + BACKWARD)
    learned = sum(operations for part, operations in flops.items() if part != "teacher") / rate
    encoder, text = flops["encoder"] * once / rate, flops.get("text", 0.0) * once / rate
    forward = learned * once + flops.get("teacher", 0.0) / rate
    forward += (encoder + text + flops.get("decoder", 0.0) * once / rate) * (setting.micro_batches > 1)
    backward = learned * (1 - once) + AGAIN[setting.checkpoint] * encoder
    beside = {"forward": OVERLAP * forward, "backward": OVERLAP * backward, "nothing": 0.0}
    sent = dict.fromkeys(beside, 0.0)
    for message in messages:
        sent[_beside(message, setting)] += seconds(message, cluster)
    exposed = sum(max(sent[part] - beside[part], 0.0) for part in sent)
    return StepTime(
        forward, backward, exposed, _optimizer(sizes, setting, cluster), sum(sent.values()) - exposed
    )


def _beside(message: Message, setting: Setting) -> str:
    """Which arithmetic runs while the message travels."""
    if message.what == "gradients":
        return "backward" if setting.num_buckets > 1 else "nothing"
    if message.what == "weights before backward":
        return "backward"
    is_prefetched = setting.stage == 3 and message.what in ("weights before forward", "teacher")
    return "forward" if is_prefetched else "nothing"


def seconds(message: Message, cluster: Cluster) -> float:
    """Of all calls of one purpose. The links of a node carry it, across nodes all their network cards at once."""
    ranks = message.within or cluster.gpus
    bandwidth, nodes = cluster.one.link * ATTAINED_LINK, 1
    if ranks > cluster.gpus_a_node:
        nodes = ranks // cluster.gpus_a_node
        bandwidth = min(bandwidth, cluster.network * ATTAINED_NETWORK * cluster.gpus_a_node)
    latency = LATENCY + HOP * math.log2(nodes)
    return message.on_wire(cluster.gpus) / bandwidth + message.calls * latency


def _optimizer(sizes: Sizes, setting: Setting, cluster: Cluster) -> float:
    share = sizes.num_trained / cluster.gpus
    average = sizes.num_averaged / cluster.gpus * AVERAGE_BYTES
    stream = cluster.one.bandwidth * ATTAINED_MEMORY
    if setting.is_offloaded:
        moved = (
            share * 2 * 2 + sizes.num_averaged / cluster.gpus * 4
        )  # gradients, weights, masters for the average
        return moved / (cluster.one.pcie * ATTAINED_PCIE) + share / HOST_ADAM + average / stream
    return (share * OPTIMIZER_BYTES + average) / stream

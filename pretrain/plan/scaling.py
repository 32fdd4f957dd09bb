"""What becomes of a step when the cluster grows and every GPU keeps its images? A simulation (weak scaling)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.plan import flops
from pretrain.plan.plan import Plan, plan_one
from pretrain.plan.settings import Setting, read

GPUS = (64, 256, 1024)  # beside those of one node


@dataclass(frozen=True)
class Grown:
    """A cluster of as many GPUs, each with the images that it has in the plan."""

    gpus: int
    seconds: float
    efficiency: float  # seconds of one node over these


def weak_scaling(plan: Plan, setting: Setting) -> list[Grown]:
    """The same setting on one node and on GPUS. hpZ, for which one node has no use, starts as the file it changes."""
    images, found = plan.run.images_per_rank(plan.cluster.gpus), []
    a_node = plan.cluster.gpus_per_node
    for nodes in sorted({1, *(-(-gpus // a_node) for gpus in GPUS)}):
        cluster = replace(plan.cluster, gpus=nodes * a_node)
        run = replace(plan.run, batch=images * cluster.gpus)
        used = setting if nodes > 1 or setting.hpz == 1 else replace(setting, zero=read()["zero3"])
        operations = flops.parts(run, plan.facts)
        one = plan_one(run, plan.facts, cluster, plan.sizes, operations, used)
        first = found[0].seconds if found else one.time.total
        found.append(Grown(cluster.gpus, one.time.total, first / one.time.total))
    return found

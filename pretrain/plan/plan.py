"""Which setting is the fastest that fits? Every setting with its memory, traffic and time, best first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pretrain.config import Run
from pretrain.facts import DataFacts
from pretrain.plan import flops
from pretrain.plan.machines import GIB, RESERVED, Cluster
from pretrain.plan.memory import Memory, memory
from pretrain.plan.settings import Setting, settings
from pretrain.plan.sizes import Sizes, sizes_of
from pretrain.plan.step_time import StepTime, step_time
from pretrain.plan.traffic import Message, traffic

TELLS_APART = 0.03  # of a step's time
SECONDS_A_DAY, SECONDS_AN_HOUR = 86_400, 3_600


@dataclass(frozen=True)
class Planned:
    """A setting, and what it needs."""

    setting: Setting
    memory: Memory
    messages: list[Message]
    time: StepTime
    room: float  # bytes of the GPU that are left at the peak; negative where it does not fit

    @property
    def fits(self) -> bool:
        return self.room >= 0


@dataclass(frozen=True)
class Plan:
    """All settings, the fastest that fits first; what is equal for all of them."""

    run: Run
    facts: DataFacts
    cluster: Cluster
    sizes: Sizes
    flops: dict[str, float]
    planned: list[Planned]

    def best(self) -> Planned:
        """ValueError when none fits, with what is missing and the remedy."""
        if self.planned[0].fits:
            return self.planned[0]
        nearest = max(self.planned, key=lambda one: one.room)
        images = self.run.images_per_rank(self.cluster.gpus)
        raise ValueError(
            f"{self.run.name} with batch={self.run.batch} fits on {self.cluster.gpus} {self.cluster.gpu} in no "
            f"setting: the leanest ({tell_setting(nearest.setting)}, {images} images a GPU) lacks "
            f"{-nearest.room / GIB:.1f} GiB a GPU: {self._remedy(nearest)}"
        )

    def _remedy(self, nearest: Planned) -> str:
        """More micro-batches where activations of encoders are too large, else more GPUs or a smaller batch."""
        num = 2 * nearest.setting.micro_batches
        while num <= self.run.images_per_rank(self.cluster.gpus):
            setting = dataclasses.replace(nearest.setting, micro_batches=num)
            if plan_one(self.run, self.facts, self.cluster, self.sizes, self.flops, setting).fits:
                return (
                    f"it would fit in {num} micro-batches: plan with --micro-batches {num}, or take more GPUs"
                )
            num *= 2
        return "take more GPUs, or a smaller --batch"

    def mfu(self, one: Planned) -> float:
        """Share of the cluster's peak that the model FLOPs of a step take."""
        return sum(self.flops.values()) / (one.time.total * self.cluster.gpus * self.cluster.one.peak)

    def days(self, one: Planned) -> float:
        return one.time.total * self.run.steps / SECONDS_A_DAY

    def gpu_hours(self, one: Planned) -> float:
        return one.time.total * self.run.steps * self.cluster.gpus / SECONDS_AN_HOUR

    def images_per_second(self, one: Planned) -> float:
        """That a GPU takes from its loader."""
        return self.run.images_per_rank(self.cluster.gpus) / one.time.total


def make_plan(
    run: Run,
    facts: DataFacts,
    cluster: Cluster,
    micro_batches: tuple[int, ...] = (1,),
    checkpoints: tuple[str, ...] | None = None,
) -> Plan:
    """ValueError when the batch does not divide over GPUs and micro-batches."""
    images = run.images_per_rank(cluster.gpus)
    for num in micro_batches:
        if num < 1 or images % (num * run.objective.input.mixed):
            raise ValueError(
                f"--micro-batches {num} must divide the {images // run.objective.input.mixed} inputs of a GPU "
                f"(batch={run.batch} on {cluster.gpus} GPUs): choose a divisor"
            )
    sizes, operations = sizes_of(run, facts), flops.parts(run, facts)
    planned = [
        plan_one(run, facts, cluster, sizes, operations, setting)
        for setting in settings(cluster.gpus_a_node, cluster.gpus, micro_batches)
        if checkpoints is None or setting.checkpoint in checkpoints
    ]
    return Plan(run, facts, cluster, sizes, operations, ranked(planned))


def ranked(planned: list[Planned]) -> list[Planned]:
    """Those that fit by time, then the others by what they lack. Of times that differ by less than a simulation can
    tell, that of the simplest setting comes first: lower ZeRO stages run no hooks around modules.
    """
    found = []
    fitting = sorted((one for one in planned if one.fits), key=lambda one: one.time.total)
    while fitting:
        alike = [one for one in fitting if one.time.total <= fitting[0].time.total * (1 + TELLS_APART)]
        found.append(min(alike, key=lambda one: _complexity(one.setting)))
        fitting.remove(found[-1])
    return found + sorted((one for one in planned if not one.fits), key=lambda one: -one.room)


def _complexity(setting: Setting) -> tuple[int, bool, int, bool]:
    """Smaller is simpler; ZeRO-2, whose gradients travel during the backward pass, before ZeRO-1."""
    order = {2: 0, 1: 1, 3: 2}
    return setting.micro_batches, setting.is_offloaded, order[setting.stage], setting.hpz > 1


def plan_one(
    run: Run, facts: DataFacts, cluster: Cluster, sizes: Sizes, operations: dict[str, float], setting: Setting
) -> Planned:
    """What one setting needs."""
    needed = memory(run, facts, sizes, setting, cluster.gpus)
    messages = traffic(run, facts, sizes, setting, cluster.gpus)
    taken = step_time(operations, sizes, setting, messages, cluster)
    return Planned(setting, needed, messages, taken, cluster.one.memory - RESERVED - needed.peak)


def tell_setting(setting: Setting) -> str:
    """In few words."""
    told = f"{setting.file}, checkpoint {setting.checkpoint}"
    return told + (f", {setting.micro_batches} micro-batches" if setting.micro_batches > 1 else "")

"""How does the teacher follow the student? A float32 moving average of each rank's own slices of the weights.

A rank averages exactly the slice of every parameter whose float32 master weight it owns under ZeRO: local
work of 12 bytes a parameter divided by the ranks. A low-precision average would be wrong: in bfloat16 an update
below 2^-9 of the weight vanishes, which at momentum 0.999 is most of them. What the teacher's forward pass reads
is a copy in the model's precision, made after every update.

What is communicated: for the float32 average nothing, under any stage. For the copy, 2 bytes a parameter in
bfloat16: under ZeRO-1 and 2 an all-gather after every update puts the slices of all ranks into whole parameters on
each; under ZeRO-3 each rank writes the teacher's own partition, and the forward pass gathers that block by block,
as it does with the student's. benchmarks/teacher_average.py measures both parts at each stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.checkpoint.ranges import Slice
from pretrain.collectives import world_size
from pretrain.zero import local_master, local_slices


class TeacherAverage:
    """The average itself, and the teacher module that shows it in low precision.

    `student` is partitioned; `teacher` has the same parameter and buffer names. Under ZeRO-3 it is
    partitioned over the same ranks without persistent parameters, so that every forward pass reads the
    partitions.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
        assert not frozen, f"{frozen} have no master weight to follow"
        self.slices = local_slices(student)
        self._student = dict(student.named_parameters())
        self._teacher = dict(teacher.named_parameters())
        assert self._student.keys() == self._teacher.keys(), "student and teacher must be built alike"
        self._teacher_buffers, self._student_buffers = (
            dict(teacher.named_buffers()),
            dict(student.named_buffers()),
        )
        kept = teacher.state_dict().keys()
        self.buffers = {
            n: _wide(b).clone() for n, b in self._student_buffers.items() if n in kept
        }  # equal on all ranks
        self._owned = [s for s in self.slices if s.numel]
        self._stable_masters: list[Tensor] | None = None
        self._average = [master.clone() for master in self._masters()]
        is_partitioned = hasattr(next(iter(self._teacher.values())), "ds_id")
        self._copies = self._plan_partitioned() if is_partitioned else self._plan_whole()
        self._publish()

    def _masters(self) -> list[Tensor]:
        """Views of the optimizer's memory, kept since DeepSpeed waits for a stream at each look-up, or copies."""
        if self._stable_masters is not None:
            return self._stable_masters
        masters, again = (
            [local_master(self._student[s.name], s.numel) for s in self._owned] for _ in range(2)
        )
        if all(one.data_ptr() == other.data_ptr() for one, other in zip(masters, again, strict=True)):
            self._stable_masters = masters
        return masters

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """average <- momentum * average + (1 - momentum) * student in float32, after an optimizer step.

        Running statistics are averaged like the weights that they belong to; counters are copied.
        """
        if self._average:
            torch._foreach_lerp_(self._average, self._masters(), 1 - momentum)
        for name, average in self.buffers.items():
            current = self._student_buffers[name]
            if average.is_floating_point():
                average.lerp_(current.to(average.dtype), 1 - momentum)
            else:
                average.copy_(current)
        self._publish()

    def state(self) -> dict[str, Float[Tensor, " numel"]]:
        """This rank's slices by parameter name, in the order of `slices` where `numel` is not 0."""
        return {s.name: average for s, average in zip(self._owned, self._average, strict=True)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        """Takes over what `state` and `buffers` were on the same rank of an equally partitioned run.

        The student is loaded before: its master weights may have moved.
        """
        self._stable_masters = None
        for part, average in zip(self._owned, self._average, strict=True):
            average.copy_(state[part.name])
        for name, average in self.buffers.items():
            average.copy_(buffers[name])
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, target in self._teacher_buffers.items():
            target.copy_(self.buffers.get(name, self._student_buffers[name]))
        copies = self._copies
        if copies.mine:
            torch._foreach_copy_(copies.mine, self._average)
        if copies.rows is not None:
            dist.all_gather(list(copies.rows.unbind()), copies.rows[dist.get_rank()].clone())
            torch._foreach_copy_(copies.targets, copies.sources)

    def _plan_partitioned(self) -> _Copies:
        return _Copies([self._teacher[s.name].ds_tensor.view(-1)[: s.numel] for s in self._owned])

    def _plan_whole(self) -> _Copies:
        """Alone, straight into the teacher; else every rank's slices end to end in its row of a buffer."""
        if world_size() == 1:
            return _Copies(self._places_of(self._owned))
        owned: list[list[Slice]] = [[] for _ in range(world_size())]
        dist.all_gather_object(owned, self._owned)
        longest = max(sum(s.numel for s in of_rank) for of_rank in owned)
        like = next(iter(self._teacher.values()))
        rows = torch.zeros(len(owned), longest, dtype=like.dtype, device=like.device)
        parts = [_split(row, of_rank) for row, of_rank in zip(rows, owned, strict=True)]
        targets = [place for of_rank in owned for place in self._places_of(of_rank)]
        return _Copies(parts[dist.get_rank()], rows, [part for of_rank in parts for part in of_rank], targets)

    def _places_of(self, owned: list[Slice]) -> list[Tensor]:
        """Where slices lie in the whole teacher."""
        return [self._teacher[s.name].view(-1)[s.start : s.start + s.numel] for s in owned]


@dataclass(frozen=True)
class _Copies:
    """How the average reaches the teacher: views made once, since making thousands takes the host longer than
    the device takes to copy."""

    mine: list[Tensor]  # where this rank's slices go
    rows: Tensor | None = None  # [world, longest] buffer of all ranks' slices, where they are exchanged
    sources: list[Tensor] = field(default_factory=list)  # parts of it, in the order of `targets`
    targets: list[Tensor] = field(default_factory=list)  # in the whole teacher


def _split(row: Tensor, owned: list[Slice]) -> list[Tensor]:
    """A rank's slices in its row."""
    sizes = [s.numel for s in owned]
    return list(row[: sum(sizes)].split(sizes))


def _wide(buffer: Tensor) -> Tensor:
    return buffer.float() if buffer.is_floating_point() else buffer

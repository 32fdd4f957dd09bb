"""How is one training step run on many ranks? The only file that calls deepspeed.initialize."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups, set_z3_leaf_modules
from torch import Tensor, nn

from pretrain.balance import BalanceTracker
from pretrain.choices import chosen
from pretrain.clock import Clock
from pretrain.collectives import rank, world_size
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.ds_config import describe, teacher_config
from pretrain.ema import TeacherAverage
from pretrain.gradient_norm import ask_before_moving, look_once
from pretrain.gradient_parts import norms_by_part
from pretrain.guard import StepGuard, Verdict
from pretrain.models.backbone import GATHER_UNITS
from pretrain.models.guides import Guide
from pretrain.optim import learning_rate, make_optimizer, teacher_momentum
from pretrain.randomness import seed_step
from pretrain.targets import TargetEncoders
from pretrain.zero import OwnedState


def mark_gather_units(module: nn.Module) -> None:
    """Makes ZeRO-3 gather each block of a backbone whole, in one message, and release it whole.

    Where parameters are gathered module by module, one whose module hands a copy on, as norms and projections
    of a fused block do, would stay gathered until the end of the backward pass.
    """
    set_z3_leaf_modules(module, list(GATHER_UNITS), raise_if_not_found=False)


class Engine:
    """Student, teacher, optimizer and loss balance of a run, one `step` at a time.

    `model` is a Pretrainer with attributes `student` and `micro_batches`, `teacher` a second module built like
    `model.student`, whose weights are overwritten with the student's; both lie on the device of
    `start_distributed`, equal on all ranks. `config` comes from `resolve_config`; `guide` is the frozen encoder,
    where targets need one: every rank holds it whole, in the model's precision.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        run: Run,
        config: dict[str, Any],
        guide: Guide | None = None,
    ) -> None:
        self.run, self.steps_done = run, 0
        self._micro_batches = model.micro_batches
        self.stage, self.dtype = describe(config)["stage"], describe(config)["dtype"]
        self.device = next(model.parameters()).device
        self.before_move: Callable[[], None] | None = None  # waits for who still reads what the step changes
        self.clock = Clock(self.device)
        self.part_norms: dict[str, Tensor] = {}  # of the last logged step, by part of the model
        teacher.load_state_dict(model.student.state_dict())
        teacher.requires_grad_(False).eval()
        # DeepSpeed looks for tensors in tuples and dicts but not in a dataclass: it gets the total alone.
        self._losses: Any = None
        model.register_forward_hook(self._keep_losses)
        self._optimizer = make_optimizer(model, run.optim)
        mark_gather_units(model)
        self._student, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        # DeepSpeed remembers hpZ's group for the process: the teacher, too, would get second copies of its weights,
        # which no update of the average reaches, and its forward pass would read those.
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        if self.stage < 3 and not self._student.optimizer.cpu_offload:
            look_once(self._student.optimizer)
        self.guard = StepGuard(run.guard)
        self.verdict: Verdict | None = None  # on the last step
        self.is_asked_to_stop = False  # by any rank, as of the last step
        self._names: list[str] = []  # of the losses in `_told`, after its `asks_to_stop`
        self._told = torch.zeros(1)  # by all ranks, before the first step: nobody asks to stop
        ask_before_moving(self._student.optimizer, self._may_move)
        self._buffers = list(model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]
        if self.stage == 3:
            mark_gather_units(teacher)
            self._teacher, *_ = deepspeed.initialize(model=teacher, config=teacher_config(config))
        else:
            self._teacher = teacher
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(self.dtype)
        self._teacher.eval()
        self.owned = OwnedState(model, self._student.optimizer)
        self.average = TeacherAverage(model.student, teacher)
        if guide is not None:
            guide = guide.to(self.device, self.dtype)
        self._encoders = TargetEncoders(self.teacher, guide, partial(self.clock.during, "teacher"))
        self.balance = BalanceTracker(run.objective.gamma, run.balance.decay, self.device)

    def _keep_losses(self, module: nn.Module, inputs: Any, losses: Any) -> Tensor:
        self._losses = losses
        return losses.total

    @torch.no_grad()
    def teacher(self, images: Tensor, *asked: Any) -> Any:
        """What the teacher makes of images [n, 3, s, s], as `Towers.forward` is asked."""
        return self._teacher(images, *asked)

    @torch.no_grad()
    def ask_teacher(self, *asked: Any) -> Any:
        """The same between two steps; under ZeRO-3 no weight stays gathered. A collective call."""
        said = self._teacher(*asked)
        if self.stage == 3:
            self._teacher.optimizer.partition_all_parameters()
        return said

    def step(self, batch: Batch, *, asks_to_stop: bool = False) -> Any:
        """One optimizer step and teacher update on this rank's share of the batch; gives the Losses, detached.

        Nothing moves, and `steps_done` does not count, where the guard refuses the step, on all ranks alike:
        `verdict` says why. Which branches an image drops is decided by the run's seed and the image's place in its
        order, whatever the ranks and micro-batches; modules that draw otherwise do so from a generator that (seed,
        step, rank) decide. Nothing here waits for the device except DeepSpeed's own check of the gradient, which
        reads with it what the ranks told each other: losses, and whether any `asks_to_stop`.
        """
        self._schedule()
        balance, self.verdict = self.balance.moved(), None
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)
        self.balance.is_told = self.run.is_logged(self.steps_done + 1)
        with self.clock.during("forward"):
            losses = self._differentiate(batch.to(self.device))
        asked = torch.full((1,), float(asks_to_stop), device=self.device)
        self._names = list(losses.nats)
        nats = [nats.detach().float().reshape(1) for nats in losses.nats.values()]
        self._told = self.balance.advance(torch.cat([asked, *nats]))
        if self.balance.is_told:
            with self.clock.during("log"):
                self.part_norms = norms_by_part(self._student.module, self.device)
        if self.before_move is not None:
            with self.clock.during("save"):
                self.before_move()
        self._move()
        if self.verdict.is_accepted:
            self.steps_done += 1
        else:
            self.balance.put_back(balance)
            if self._buffers:
                torch._foreach_copy_(self._buffers, self._buffers_before)
        return losses

    def _schedule(self) -> None:
        """Sets what is a function of the step alone: seed, learning rate, momentum of the teacher."""
        seed_step(self.run.seed, self.steps_done, rank())
        self.lr = learning_rate(self.steps_done, self.run)
        self.momentum = teacher_momentum(self.steps_done, self.run)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr

    def _differentiate(self, batch: Batch) -> Any:
        """Leaves the gradient of the batch's losses with DeepSpeed; gives the Losses, detached."""
        # Parts hand their gradients on one after another: ranks tell each other the sum alone.
        once = self._student.coalesce_grad_reduction() if self._micro_batches > 1 else nullcontext()
        with once:
            total = self._student(batch=batch, encoders=self._encoders, tracker=self.balance)
            losses, self._losses = self._losses, None
            with self.clock.during("backward"):
                self._student.backward(total)
        return dataclasses.replace(losses, total=total.detach())

    def _move(self) -> None:
        """Optimizer step, then the teacher's average; neither where the guard refuses the step."""
        with self.clock.during("optimizer"):
            self._student.step()
        if self.stage == 3:
            self._teacher.optimizer.partition_all_parameters()
        if self.verdict is None:  # DeepSpeed had no need of a norm to see that the gradient is not finite
            self._may_move(torch.full((1,), torch.inf, device=self.device))
        if self.verdict.is_accepted:
            with self.clock.during("teacher"):
                self.average.update(self.momentum)

    @property
    def chosen(self) -> str:
        """What availability chose for this run, in words."""
        return chosen(self.run, self.dtype, self.device, self._optimizer)

    def _may_move(self, norm: Tensor) -> bool:
        """The guard's verdict on the step, given its gradient norm; the one wait for the device."""
        numbers = torch.cat([norm.to(self.device, torch.float32).reshape(1), self._told]).tolist()
        found, asked, *sums = numbers
        self.is_asked_to_stop = asked > 0
        losses = dict(zip(self._names, (total / world_size() for total in sums), strict=True))
        self.verdict = self.guard.judge(self.steps_done, found if found >= 0 else torch.inf, losses)
        return self.verdict.is_accepted

    @property
    def grad_norm(self) -> Tensor | float:
        """Norm of the whole gradient of the last step, before clipping; inf where the step was skipped."""
        return self._student.get_global_grad_norm()

    @property
    def skipped_steps(self) -> int:
        """Steps of the run that the guard refused, so that nothing moved."""
        return self.guard.num_refused

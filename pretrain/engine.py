"""How is one training step run on many ranks? The only file that calls deepspeed.initialize."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from pretrain.balance import BalanceTracker
from pretrain.checkpoint import NATIVE_TAG
from pretrain.choices import chosen
from pretrain.clock import Clock
from pretrain.collectives import rank
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.ds_config import describe, teacher_config
from pretrain.ema import TeacherAverage
from pretrain.gradient_norm import look_once
from pretrain.gradient_parts import norms_by_part
from pretrain.models.backbone import GATHER_UNITS
from pretrain.models.guides import Guide
from pretrain.optim import learning_rate, make_optimizer, teacher_momentum
from pretrain.randomness import seed_step
from pretrain.targets import TargetEncoders


def mark_gather_units(module: nn.Module) -> None:
    """Makes ZeRO-3 gather each block of a backbone whole, in one message, and release it whole.

    Where parameters are gathered module by module, one whose module hands a copy on, as norms and projections
    of a fused block do, would stay gathered until the end of the backward pass.
    """
    set_z3_leaf_modules(module, list(GATHER_UNITS), raise_if_not_found=False)


class Engine:
    """Student, teacher, optimizer and loss balance of a run, one `step` at a time.

    `model` is a Pretrainer with attribute `student`, `teacher` a second module built like `model.student`,
    whose weights are overwritten with the student's; both lie on the device of `start_distributed`, equal
    on all ranks. `config` comes from `resolve_config`; `guide` is the frozen encoder, where targets need one: every
    rank holds it whole, in the model's precision.
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
        self.stage, self.dtype = describe(config)["stage"], describe(config)["dtype"]
        self.device = next(model.parameters()).device
        self.clock = Clock(self.device)
        self.part_norms: dict[str, Tensor] = {}  # of the last logged step, by part of the model
        self.checkpoint_bytes = _checkpoint_bytes(model, self.dtype)
        teacher.load_state_dict(model.student.state_dict())
        teacher.requires_grad_(False).eval()
        # DeepSpeed looks for tensors in tuples and dicts but not in a dataclass: it gets the total alone.
        self._losses: Any = None
        model.register_forward_hook(self._keep_losses)
        self._optimizer = make_optimizer(model, run.optim)
        mark_gather_units(model)
        self._student, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=config)
        if self.stage < 3 and not self._student.optimizer.cpu_offload:
            look_once(self._student.optimizer)
        if self.stage == 3:
            mark_gather_units(teacher)
            self._teacher, *_ = deepspeed.initialize(model=teacher, config=teacher_config(config))
        else:
            self._teacher = teacher
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(self.dtype)
        self._teacher.eval()
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

    def step(self, batch: Batch) -> Any:
        """One optimizer step and teacher update on this rank's share of the batch; gives the Losses, detached.

        Neither weights nor teacher move where the gradient is not finite on any rank; all ranks agree on it.
        Drop path and the like draw from a generator that (seed, step, rank) alone decide, so a resumed run
        repeats them. Nothing here waits for the device except DeepSpeed's own check of the gradient.
        """
        self._schedule()
        self.balance.is_told = self.run.is_logged(self.steps_done + 1)
        with self.clock.during("forward"):
            losses = self._differentiate(batch.to(self.device))
        self.balance.advance()
        if self.balance.is_told:
            with self.clock.during("log"):
                self.part_norms = norms_by_part(self._student.module, self.device)
        self._move()
        self.steps_done += 1
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
        total = self._student(batch=batch, encoders=self._encoders, tracker=self.balance)
        losses, self._losses = self._losses, None
        with self.clock.during("backward"):
            self._student.backward(total)
        return dataclasses.replace(losses, total=total.detach())

    def _move(self) -> None:
        """Optimizer step, then the teacher's average; neither where the gradient is not finite."""
        skipped = self.skipped_steps
        with self.clock.during("optimizer"):
            self._student.step()
        if self.stage == 3:
            self._teacher.optimizer.partition_all_parameters()
        if self.skipped_steps == skipped:
            with self.clock.during("teacher"):
                self.average.update(self.momentum)

    @property
    def chosen(self) -> str:
        """What availability chose for this run, in words."""
        return chosen(self.run, self.dtype, self.device, self._optimizer)

    @property
    def grad_norm(self) -> Tensor | float:
        """Norm of the whole gradient of the last step, before clipping; inf where the step was skipped."""
        return self._student.get_global_grad_norm()

    @property
    def skipped_steps(self) -> int:
        """Steps since the start of this process whose gradient was not finite, so that no weight moved."""
        return self._student.skipped_steps

    def save_native(self, folder: Path) -> None:
        """Writes DeepSpeed's own checkpoint of model and optimizer; all ranks call it."""
        self._student.save_checkpoint(str(folder), tag=NATIVE_TAG)

    def load_native(self, folder: Path) -> None:
        """Reads what `save_native` wrote on as many ranks at the same ZeRO stage."""
        loaded, _ = self._student.load_checkpoint(str(folder), tag=NATIVE_TAG)
        assert loaded is not None, f"DeepSpeed found nothing in {folder}"


def _checkpoint_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Of the weights in `dtype`, their float32 masters with two moments of Adam, and the float32 teacher."""
    trained = sum(p.numel() for p in model.parameters())
    averaged = sum(p.numel() for p in model.student.parameters())
    return trained * (dtype.itemsize + 3 * 4) + averaged * 4

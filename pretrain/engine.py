"""How is one training step run on many ranks? The only file that calls deepspeed.initialize."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import reprlib
import socket
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups, set_z3_leaf_modules
from pydantic import ValidationError
from torch import Tensor, nn

from pretrain.balance import BalanceTracker
from pretrain.checkpoint import NATIVE_TAG
from pretrain.collectives import rank, sum_over_ranks, world_size
from pretrain.config import Run
from pretrain.data.batch import Batch
from pretrain.ema import TeacherAverage
from pretrain.gradient_norm import look_once
from pretrain.models.backbone import GATHER_UNITS
from pretrain.models.guides import Guide
from pretrain.optim import learning_rate, make_optimizer, teacher_momentum
from pretrain.randomness import seed_step
from pretrain.targets import TargetEncoders

RECIPE_OWNS = {  # key of a ds config -> field of the recipe that decides it
    "optimizer": "optim",
    "scheduler": "optim.warmup, optim.final_lr",
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optim.clip",
    "steps_per_print": "log_every",
}
DS_CONFIG_OWNS = (  # memory and communication; DeepSpeed ignores keys that it does not know, we refuse them
    "zero_optimization",
    "bf16",
    "communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "comms_logger",
)
TEACHER_ZERO = ("contiguous_gradients", "stage3_prefetch_bucket_size", "overlap_comm", "offload_param")
NEVER = 10**9  # steps between DeepSpeed's own log lines


def start_distributed() -> torch.device:
    """Joins the process group that the launcher's environment describes, or makes one of this process alone.

    gloo without CUDA or where DS_ACCELERATOR=cpu says so, NCCL otherwise. Returns the device of this rank.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind((alone["MASTER_ADDR"], 0))
            os.environ.update(alone, MASTER_PORT=str(free.getsockname()[1]))
    # On a CPU DeepSpeed would compile shared-memory collectives first: minutes, a compiler, and, after a kill
    # meanwhile, a lock file for which every later start waits forever. gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if get_accelerator().device_name() == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except dist.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"the ranks cannot meet at {place} ({str(error).splitlines()[0]}): if another run uses that port, start "
            "by jobs/local/pretrain.sh, which finds a free one, or give the launcher --master_port"
        ) from error
    return device


def is_fast_in_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Does this machine multiply bfloat16 matrices in hardware, and what says so."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    found = sorted(flags & {"amx_bf16", "avx512_bf16"})
    return bool(found), f"CPU with {found[0]}" if found else "CPU without amx_bf16 or avx512_bf16"


def check_config(ds_config: dict[str, Any], run: Run, world: int) -> None:
    """ValueError when a key belongs to the recipe or to nobody, the ZeRO stage is not 1, 2 or 3, or the
    batch does not divide over `world` ranks.
    """
    for key, value in ds_config.items():
        if key in RECIPE_OWNS:
            raise ValueError(
                f"{key}={value!r} in the ds config is decided by the recipe: delete it there and set "
                f"{RECIPE_OWNS[key]} of the recipe"
            )
        if key not in DS_CONFIG_OWNS:
            raise ValueError(f"{key!r} in the ds config is not used; choose from {sorted(DS_CONFIG_OWNS)}")
    for key in ("zero_optimization", "bf16"):
        if not isinstance(ds_config.get(key, {}), dict):
            raise ValueError(f"{key}={ds_config[key]!r} in the ds config must be an object, as in zero3.json")
    if unknown := sorted(ds_config.get("bf16", {}).keys() - {"enabled"}):
        raise ValueError(f"bf16.{unknown[0]} in the ds config is not used; choose from ['enabled']")
    stage = ds_config.get("zero_optimization", {}).get("stage")
    if stage is True or stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage={stage!r} in the ds config must be 1, 2 or 3: for one rank take 1, which then "
            "divides nothing"
        )
    _check_zero(ds_config["zero_optimization"])
    enabled = ds_config.get("bf16", {}).get("enabled", False)
    if enabled not in (True, False, "auto"):
        raise ValueError(f'bf16.enabled={enabled!r} in the ds config must be true, false or "auto"')
    run.images_per_rank(world)


def _check_zero(section: dict[str, Any]) -> None:
    """ValueError for the first key or value that DeepSpeed would refuse, or silently take for another."""
    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        near = difflib.get_close_matches(key, known, 1) if first["type"] == "extra_forbidden" else []
        remedy = f"did you mean {near[0]!r}?" if near else "see the documentation of DeepSpeed's ZeRO"
        raise ValueError(
            f"zero_optimization.{key}={reprlib.repr(first['input'])} in the ds config: {first['msg']}; {remedy}"
        ) from error


def resolve_config(ds_config: dict[str, Any], run: Run, device: torch.device) -> tuple[dict[str, Any], str]:
    """The ds config plus what the recipe decides, complete for DeepSpeed, and one line that says what is used.

    All ranks call it: bfloat16 that is left to the machine ("auto") is used when it is fast on all of them.
    ValueError as `check_config`.
    """
    check_config(ds_config, run, world_size())
    fast, machine = is_fast_in_bfloat16(device)
    fast = bool(sum_over_ranks(torch.tensor(float(fast), device=device)) == world_size())
    config = copy.deepcopy(ds_config)
    bf16 = config.setdefault("bf16", {"enabled": False})
    bf16["enabled"] = fast if bf16.get("enabled") == "auto" else bf16.get("enabled", False)
    config |= {
        "train_micro_batch_size_per_gpu": run.images_per_rank(world_size()),
        "gradient_accumulation_steps": 1,  # with more, DeepSpeed scales heads and encoder differently
        "gradient_clipping": run.optim.clip,  # DeepSpeed's own default is 1.0, not off
        "steps_per_print": NEVER,
        "zero_force_ds_cpu_optimizer": False,  # offload works with torch's AdamW, as everywhere else
    }
    used = describe(config)
    return config, f"ZeRO-{used['stage']}, {used['world']} ranks, {used['dtype']} ({machine})"


def describe(config: dict[str, Any]) -> dict[str, Any]:
    """What of a resolved config decides the files of a checkpoint."""
    return {
        "world": world_size(),
        "stage": config["zero_optimization"]["stage"],
        "dtype": torch.bfloat16 if config["bf16"]["enabled"] else torch.float32,
    }


def teacher_config(config: dict[str, Any]) -> dict[str, Any]:
    """For a module that is only read, partitioned like the student.

    No parameter persists and none is kept for reuse: a resident copy would go on showing old weights.
    """
    zero = {key: value for key, value in config["zero_optimization"].items() if key in TEACHER_ZERO}
    fixed = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    kept = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "bf16", "steps_per_print")}
    return kept | {"zero_optimization": zero | fixed}


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
        self.checkpoint_bytes = _checkpoint_bytes(model, self.dtype)
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
        self._encoders = TargetEncoders(self.teacher, guide)
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
        seed_step(self.run.seed, self.steps_done, rank())
        self.lr = learning_rate(self.steps_done, self.run)
        self.momentum = teacher_momentum(self.steps_done, self.run)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        batch = batch.to(self.device)
        total = self._student(batch=batch, encoders=self._encoders, tracker=self.balance)
        losses, self._losses = self._losses, None
        self._student.backward(total)
        self.balance.advance()
        skipped = self.skipped_steps
        self._student.step()
        if self.stage == 3:
            self._teacher.optimizer.partition_all_parameters()
        if self.skipped_steps == skipped:
            self.average.update(self.momentum)
        self.steps_done += 1
        return dataclasses.replace(losses, total=total.detach())

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

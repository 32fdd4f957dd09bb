"""What of memory and communication does a ds config decide, and what has no business there?"""

from __future__ import annotations

import copy
import difflib
import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from pretrain.collectives import sum_over_ranks, world_size
from pretrain.config import Run

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
    "aio",
    "comms_logger",
)
TEACHER_ZERO = ("contiguous_gradients", "stage3_prefetch_bucket_size", "overlap_comm", "offload_param")
NEVER = 10**9  # steps between DeepSpeed's own log lines


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file and the place that is not JSON."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--ds-config {path} must be JSON: {error}; mend that place or use another"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"--ds-config {path} holds a {type(config).__name__}, it must be a JSON object {{...}}"
        )
    return config


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
    _check_together(ds_config, stage)
    enabled = ds_config.get("bf16", {}).get("enabled", False)
    if enabled not in (True, False, "auto"):
        raise ValueError(f'bf16.enabled={enabled!r} in the ds config must be true, false or "auto"')
    run.images_per_rank(world)


def _check_together(ds_config: dict[str, Any], stage: int) -> None:
    """ValueError for what DeepSpeed 0.19 takes and then fails with, or makes another optimizer of than we know."""
    zero, in_bf16 = ds_config["zero_optimization"], ds_config.get("bf16", {}).get("enabled", False)
    if stage == 1 and in_bf16 and (ds_config.get("data_types") or {}).get("grad_accum_dtype") == "fp32":
        raise ValueError(
            "data_types.grad_accum_dtype='fp32' in the ds config makes another optimizer of ZeRO-1 in bfloat16, "
            "which cannot be checkpointed here: take zero_optimization.stage=2, or leave it out"
        )
    if zero.get("round_robin_gradients"):
        raise ValueError(
            "zero_optimization.round_robin_gradients=true in the ds config hides gradients from the log of their "
            "norms: leave it out"
        )
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio != 1.0:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio={ratio} in the ds config takes DeepSpeed's own optimizer, "
            "which is not used: it must be 1.0"
        )


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

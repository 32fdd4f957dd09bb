"""What is kept of a run, and how does it go on from there?

OUT/checkpoints/step_000400/, or s3://bucket/prefix/step_000400/
    student/                    float32 master weights: rank_00000.safetensors holds the slices that a rank owned,
                                layout.json all shapes and who holds which slice, buffers.safetensors the buffers
    optimizer/                  both moments of AdamW, sliced like the student; none before the first step
    teacher/                    float32 moving average, in the form of student/
    random/rank_00000.json      states of torch's, numpy's and Python's generators
    run.json facts.json         the resolved recipe; what the model knows of the data
    tokenizer/                  a copy, if the run has text
    state.json                  step, data position, loss balance, ranks, ZeRO stage, versions, commit, hardware, date
    COMPLETE                    bytes and SHA-256 of every other file; written last

Every value is written once, by the rank that owns it, and read by whoever needs it: a run goes on with any number of
ranks, at any ZeRO stage, in any precision. What bears the name step_N and has its COMPLETE is whole unless the disk
later broke it, and `latest` finds that.
"""

from importlib import import_module
from typing import Any

from pretrain.checkpoint.names import (
    PLACE_RECORD,
    checkpoint_folder,
    checkpoints_of,
    folder_in,
    is_gone,
    is_known,
    kept_of,
    latest,
    place_name,
    record_place,
    recorded_place,
    step_of,
    steps_in,
)
from pretrain.checkpoint.stores import left_out, read_json

# Name -> the module that has it, which comes when it is asked for: torch, or even the models, take seconds.
OWNERS = {
    "Lasting": "saver",
    "Saver": "saver",
    "WEIGHTS": "read",
    "load_student": "read",
    "load_teacher": "read",
    "load_towers": "towers",
    "restore": "read",
}

__all__ = [
    "PLACE_RECORD",
    "checkpoint_folder",
    "checkpoints_of",
    "folder_in",
    "is_gone",
    "is_known",
    "kept_of",
    "latest",
    "left_out",
    "place_name",
    "read_json",
    "record_place",
    "recorded_place",
    "step_of",
    "steps_in",
]


def __getattr__(name: str) -> Any:
    if name not in OWNERS:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(import_module(f"{__name__}.{OWNERS[name]}"), name)

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

from pretrain.checkpoint.names import (
    PLACE_RECORD,
    checkpoint_folder,
    checkpoints_of,
    folder_in,
    kept_of,
    latest,
    place_name,
    record_place,
    recorded_place,
    step_of,
    steps_in,
)
from pretrain.checkpoint.read import (
    WEIGHTS,
    left_out,
    load_student,
    load_teacher,
    load_towers,
    read_json,
    restore,
)
from pretrain.checkpoint.saver import Saver

__all__ = [
    "PLACE_RECORD",
    "WEIGHTS",
    "Saver",
    "checkpoint_folder",
    "checkpoints_of",
    "folder_in",
    "kept_of",
    "latest",
    "left_out",
    "load_student",
    "load_teacher",
    "load_towers",
    "place_name",
    "read_json",
    "record_place",
    "recorded_place",
    "restore",
    "step_of",
    "steps_in",
]

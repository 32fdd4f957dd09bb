"""In which dtypes is a case of the steps around DCNv3 interpreted?"""

from __future__ import annotations

# One of every kernel: bfloat16 and float16 differ from float32 by conversions alone, whatever a branch adds.
SHORT = ("share_gamma_outer_following", "depthwise_5", "norm_alone")


def dtypes_of(case: str) -> list[str]:
    """Of float32, bfloat16 and float16."""
    return ["float32", *(["bfloat16", "float16"] if case in SHORT else [])]

"""In which dtypes is a case of the steps around DCNv3 interpreted?"""

from __future__ import annotations

FLOAT16 = ("share_gamma_outer_following", "depthwise_5", "norm_alone")  # one of every kernel: it differs from
# bfloat16 by conversions alone


def dtypes_of(case: str) -> list[str]:
    """Of float32, bfloat16 and float16."""
    return ["float32", "bfloat16", *(["float16"] if case in FLOAT16 else [])]

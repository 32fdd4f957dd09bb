"""Which pseudo-random number belongs to a number? The same on every device, whoever asks, in any order."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

UPPER = 53  # bits of `upper_bits`: as many as float64 holds


def splitmix64(numbers: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """Output number n + 1 of SplitMix64 with seed 0, for every n; a permutation of all of int64, which wraps.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), variant 13 of
    Stafford's.
    """
    mixed = (numbers + 1) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed


def upper_bits(numbers: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """The upper UPPER bits, in [0, 2^UPPER)."""
    return _shifted(numbers, 64 - UPPER)


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    """Shifted to the right with zeros following; int64 itself shifts copies of the sign in."""
    return (numbers >> shift) & (2 ** (64 - shift) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - (word >> 63 << 64)

"""How is a quantity written for a reader?"""

from __future__ import annotations

import math

TIE = "\u00a0"  # a space at which no line breaks


def significant(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits without a useless tail: 0.0417, 1.3, 12, 4.2e-06, 84,000."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 7:
        return f"{value:.{digits - 1}e}"
    decimals = max(digits - 1 - exponent, 0)
    text = f"{round(value, decimals):,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in percent: 0.417 -> 41.7 %."""
    return f"{100 * fraction:.{digits}f}{TIE}%"


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 42 s, 6 min 20 s, 3 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}{TIE}s"
    if seconds < 3600:
        return f"{seconds // 60}{TIE}min {seconds % 60:02d}{TIE}s"
    return f"{seconds // 3600}{TIE}h {seconds % 3600 // 60:02d}{TIE}min"


def magnitude(count: float) -> str:
    """A count in words: 1.09 billion, 4.2 million, 12,800."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{significant(count / size)} {word}"
    return f"{count:,.0f}"

"""Which runs exist? `load("m3i.demo")` calls the function `demo` of `pretrain/recipes/m3i.py`."""

from __future__ import annotations

from pretrain.config import Run
from pretrain.recipes import m3i, rows

MODULES = {"m3i": m3i, "rows": rows}


def names() -> list[str]:
    """Every recipe, as the command line writes it."""
    return [f"{name}.{recipe}" for name, module in MODULES.items() for recipe in module.RECIPES]


def load(name: str) -> Run:
    """The run that a recipe describes; ValueError lists all recipes when the name is unknown."""
    module, _, recipe = name.partition(".")
    if module not in MODULES or recipe not in MODULES[module].RECIPES:
        raise ValueError(f"recipe={name!r} is unknown; choose from {names()}")
    return MODULES[module].RECIPES[recipe]()

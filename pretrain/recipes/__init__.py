"""Which runs exist? `load("m3i.demo")` calls the function `demo` of `pretrain/recipes/m3i.py`."""

from __future__ import annotations

import difflib
from pathlib import Path

from pretrain.config import Run
from pretrain.recipes import hvp, m3i, mvp, rows

MODULES = {"m3i": m3i, "mvp": mvp, "hvp": hvp, "rows": rows}


def names() -> list[str]:
    """Every recipe, as the command line writes it."""
    return [f"{name}.{recipe}" for name, module in MODULES.items() for recipe in module.RECIPES]


def load(name: str) -> Run:
    """The run that a recipe describes, or that a recipe.json holds, as every run leaves one in its folder.

    ValueError lists all recipes when the name is unknown, and names the field of a file that does not fit.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"--recipe {name} is no file: name a recipe.json of a run, or one of {names()}"
            )
        try:
            return Run.from_json(Path(name).read_text())
        except ValueError as error:
            raise ValueError(
                f"--recipe {name} does not describe a run, since {error}: mend it, or copy the recipe.json of a run"
            ) from error
    module, _, recipe = name.partition(".")
    if module not in MODULES or recipe not in MODULES[module].RECIPES:
        near = difflib.get_close_matches(name, names(), 1)
        meant = f", did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"recipe={name!r} is unknown{meant} choose from {names()}")
    return MODULES[module].RECIPES[recipe]()

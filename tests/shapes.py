"""Which checker watches types and shapes while tests run, and how does it come into the packages?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from importlib.machinery import SourceFileLoader
from random import Random
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from jaxtyping import _import_hook, install_import_hook, jaxtyped

# An int is welcome where a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_packages(*names: str) -> None:
    """What is imported of these packages from now on is checked; call it once a process.

    jaxtyping has compiled files of its own for as long as a module runs, and so for all that the module imports:
    torch, transformers and the rest were compiled anew, half of the time that collecting tests took. Here it has them
    for that module alone. And it makes the check of a function when that is defined, two milliseconds for each of
    thousands that a process may never call: here when it is first called.

    beartype looks at one item of a list, which it draws from Python's global generator. A thread whose calls are
    checked would change what another one, which has just seeded that generator, draws from it. Here it has its own.
    """

    class Loader(_import_hook._JaxtypingLoader):
        def get_code(self, fullname: str) -> CodeType | None:
            marked = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
            with patch("importlib._bootstrap_external.cache_from_source", marked):
                return super().get_code(fullname)

        exec_module = SourceFileLoader.exec_module

    codemain.getrandbits = Random(0).getrandbits
    jaxtyping.jaxtyped = checked_when_called
    _import_hook._JaxtypingLoader = Loader
    install_import_hook(list(names), f"{__name__}.checked")


def checked_when_called(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """`jaxtyped`, whose decorator leaves functions of modules and classes as they are until they are called."""

    def decorate(defined: Any) -> Any:
        if not isinstance(defined, FunctionType) or "<locals>" in defined.__qualname__:
            return jaxtyped(defined, typechecker=typechecker)
        made: list[Callable[..., Any]] = []

        @wraps(defined)
        def check(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            if not made:
                made.append(jaxtyped(defined, typechecker=typechecker))
            return made[0](*args, **kwargs)

        return check

    return decorate

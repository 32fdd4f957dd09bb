"""Which checker watches types and shapes while tests run, and how does it come into the packages?"""

from __future__ import annotations

from functools import partial
from importlib.machinery import SourceFileLoader
from random import Random
from types import CodeType
from unittest.mock import patch

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from jaxtyping import _import_hook, install_import_hook

# An int is welcome where a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_packages(*names: str) -> None:
    """What is imported of these packages from now on is checked; call it once a process.

    jaxtyping has compiled files of its own for as long as a module runs, and so for all that the module imports:
    torch, transformers and the rest were compiled anew, half of the time that collecting tests took. Here it has them
    for that module alone.

    beartype looks at one item of a list, which it draws from Python's global generator. A thread whose calls are
    checked would change what another one, which has just seeded that generator, draws from it. Here it has its own.
    """
    codemain.getrandbits = Random(0).getrandbits

    class Loader(_import_hook._JaxtypingLoader):
        def get_code(self, fullname: str) -> CodeType | None:
            marked = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
            with patch("importlib._bootstrap_external.cache_from_source", marked):
                return super().get_code(fullname)

        exec_module = SourceFileLoader.exec_module

    _import_hook._JaxtypingLoader = Loader
    install_import_hook(list(names), f"{__name__}.checked")

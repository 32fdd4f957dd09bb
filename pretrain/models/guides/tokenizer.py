"""What lies in the folder of a tokenizer of distilled features, and how is it opened?

DIR/
    codebook.safetensors    "codes": unit vectors, float32 [codes, width]
    codebook.json           how it was made, and how evenly the codes are used
    guide/                  a copy of the guide whose features are looked up
    COMPLETE                digests of all of it
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from jaxtyping import Float32
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import intact
from pretrain.models.guides.guide import Guide, Opened

CODEBOOK, RECORD, GUIDE = "codebook.safetensors", "codebook.json", "guide"
CODES = "codes"  # name of the tensor


def is_folder(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def open_folder(folder: Path, open_inner: Callable[[Path], Opened]) -> Guide:
    """The guide in the folder with its codebook; ValueError when the folder is not whole."""
    problem = intact.verify(folder, hashes=True)
    if problem is not None:
        raise ValueError(
            f"tokenizer {folder} cannot be used, since {problem}: copy it again, or make it by "
            "`python -m pretrain.codebook`"
        )
    inner = open_inner(folder / GUIDE)
    files = (CODEBOOK, *(f"{GUIDE}/{name}" for name in inner.files))
    return Guide(dataclasses.replace(inner, folder=folder, files=files), load_file(folder / CODEBOOK)[CODES])


def write_codebook(folder: Path, codebook: Float32[Tensor, "k d"]) -> None:
    save_file({CODES: codebook.contiguous()}, folder / CODEBOOK)


def copy_guide(guide: Guide, folder: Path) -> None:
    """Writes guide/ with all that the guide was read from, so that the tokenizer needs nothing else."""
    target = folder / GUIDE
    for name in guide.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(guide.folder / name, target / name)
    intact.mark(target, intact.digest(target, guide.files))

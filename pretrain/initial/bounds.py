"""How large may a model be that a stranger's settings describe? As large as the weights beside them explain.

A config.json of 300 bytes can name a thousand layers. What is built is counted tensor by tensor while it is built,
on the meta device wherever that is possible, so that a model that is too large is refused before it takes memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registrations

from pretrain.initial.files import PICKLES, own_file, read_tensors
from pretrain.initial.pickles import tensors_in

TIMES = 4  # bytes of a model in float32 / bytes of weights in 8 bits
SLACK = 2**26  # bytes of what no file holds: masks and tables that are computed, a head of other labels
SPLIT = 8  # tensors of a model / tensors of a file that has some of them joined
SPARE = 512  # tensors, whatever the file has
BARE = 64  # modules, with and without tensors / tensors of the model that are allowed
MOST_PIXELS = 4096  # a side, of images whose size a file tells
MOST = (
    2**17
)  # of layers, widths and words that settings tell; lists of that length are made before any module


@contextmanager
def explained_by(tensors: Mapping[str, Any], place: Path) -> Iterator[None]:
    """Within it ValueError for a module that is built larger than the `tensors` of `place` explain."""
    own = [tensor for _, tensor in tensors_in(tensors)]
    most_bytes = TIMES * sum(tensor.numel() * tensor.element_size() for tensor in own) + SLACK
    most_tensors = SPLIT * len(own) + SPARE
    found: dict[tuple[int, str], int] = {}
    modules = 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            found[id(module), name] = tensor.numel() * tensor.element_size()
            if len(found) > most_tensors or (len(found) % 64 == 0 and sum(found.values()) > most_bytes):
                refuse()
            if found[id(module), name] > most_bytes:
                refuse()

    def count_modules(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > BARE * most_tensors:
            refuse()

    def refuse() -> None:
        raise ValueError(
            f"{place} describes a model of {len(found):,} tensors, {sum(found.values()) / 2**20:,.0f} MiB and more, "
            f"where its weights are {len(own):,} tensors that explain at most {most_tensors:,} of "
            f"{most_bytes / 2**20:,.0f} MiB: its settings do not belong to its weights; take both from its authors "
            "again, or export it again"
        )

    with ExitStack() as hooks:
        for register, hook in (
            (registrations.register_module_parameter_registration_hook, count),
            (registrations.register_module_buffer_registration_hook, count),
            (registrations.register_module_module_registration_hook, count_modules),
        ):
            hooks.callback(register(hook).remove)
        yield
        if sum(found.values()) > most_bytes:
            refuse()


def weights_of(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What files right in a folder hold, by file, unread; ValueError for a hostile one, and for one elsewhere.

    They are those that are loaded: a state of an optimizer beside them is no weight of the model.
    """
    for name in names:
        if Path(name).name != name or Path(name).suffix not in (".safetensors", *PICKLES):
            raise ValueError(
                f"{folder} names {name!r} as its weights, which must be a file of weights right in it: copy the "
                "folder again"
            )
    return {name: read_tensors(own_file(folder, name)) for name in names}


def require_pixels(size: Any, place: Path | str, remedy: str = "give --image-size") -> int:
    """The size of images that a file or option tells, as it is; ValueError unless it is one that memory can hold."""
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= MOST_PIXELS:
        raise ValueError(
            f"{place} tells images of {size!r} pixels a side, which must lie in [1, {MOST_PIXELS}]: {remedy}"
        )
    return size


def require_statistics(mean: Any, std: Any, place: Path | str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as they are; ValueError unless each is three finite numbers within +-1, those of `std` above 0."""
    for told in (mean, std):
        is_list = isinstance(told, list | tuple) and len(told) == 3
        if not is_list or not all(type(one) in (int, float) and math.isfinite(one) for one in told):
            break
    else:
        if min(std) > 0 and max(*map(abs, mean), *std) <= 1:
            return tuple(map(float, mean)), tuple(map(float, std))
    raise ValueError(
        f"{place} has mean={mean!r}, std={std!r} of its pixels, which must be three finite numbers each, std above "
        "0, and none beyond 1, as pixels lie in [0, 1]: divide by 255 what is meant for [0, 255], or take the file "
        "from its authors again"
    )


def require_numbers(settings: Any, place: Path) -> None:
    """ValueError for a whole number above MOST anywhere in the settings of a model."""
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, int | float) and not abs(value) <= MOST:
            raise ValueError(
                f"{place} tells a model by the number {value}, where none is above {MOST:,}: take the file from its "
                "authors again"
            )

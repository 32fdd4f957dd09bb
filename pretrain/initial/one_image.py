"""How much memory does one image take in a stranger's model? None that takes more than MOST_BYTES is run.

Weights of 200 kB can cut an image of 4096 pixels into 16 million tokens. What an operation gives is sized by tensors
without numbers before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

MOST_BYTES = 2**32  # alive at once beside the weights; SAM's ViT-H takes 2.2 GiB for 1024 pixels a side
NUMBER = (
    torch.ops.aten._local_scalar_dense.default
)  # .item() gives no tensor, and has no value without numbers


class TooLargeImage(ValueError):
    pass


def try_image(tower: Callable[[Tensor], Tensor], size: int, place: object) -> Tensor:
    """What the tower of `place` gives for one black image [1, 3, size, size].

    TooLargeImage in place of the first operation after which more than MOST_BYTES would be alive.
    """
    refused = (
        f"{place} takes more than {MOST_BYTES / 2**30:g} GiB of memory for one image of {size} pixels a side: give "
        "smaller images where you name their size, else take its settings from its authors again"
    )
    with torch.no_grad(), _Bounded(refused):
        return tower(torch.zeros(1, 3, size, size))


class _Bounded(TorchDispatchMode):
    def __init__(self, refused: str) -> None:
        super().__init__()
        self.refused, self.without_numbers = refused, FakeTensorMode()
        self.alive = WeakIdKeyDictionary()  # bytes by storage

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not NUMBER and sum(self.alive.values()) + self._planned(func, args, kwargs) > MOST_BYTES:
            raise TooLargeImage(self.refused)
        found = func(*args, **kwargs)
        self.alive.update((storage, storage.nbytes()) for storage in _made(found, (args, kwargs)))
        return found

    def _planned(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Bytes that an operation will make."""
        with self.without_numbers as mode:
            given = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            return sum(storage.nbytes() for storage in _made(func(*given[0], **given[1]), given))


def _made(found: Any, given: Any) -> list[UntypedStorage]:
    """The storages of tensors that those given do not share, each once."""
    found, given = (
        {
            id(storage): storage
            for storage in (t.untyped_storage() for t in tree_leaves(c) if isinstance(t, Tensor))
        }
        for c in (found, given)
    )
    return [found[key] for key in found.keys() - given.keys()]

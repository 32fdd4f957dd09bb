"""What does a rank of a real step allocate and send? `python counted.py FOLDER` under RANK, WORLD_SIZE and so on.

Rank 0 leaves FOLDER/result.json, an entry a variant: bytes that tensors hold at rest, at the most until the
optimizer's step, and at the most of all, by collective of a step, and its calls. On a CPU what is offloaded is among
them.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.collectives import rank, world_size
from pretrain.config import Run
from pretrain.recipes import load
from tests.fakes import FACTS, random_batch, shrink
from tests.paths import ROOT

BUCKET = 300_000  # elements: several to the model
BUCKETS = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
DEEP = {"reduce_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
PERSISTENT, LIVE = "stage3_param_persistence_threshold", "stage3_max_live_parameters"
AGAIN = {"stage3_max_reuse_distance": 0, LIVE: 0}  # weights are released after the forward pass
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> ds config, changes of its ZeRO section
    "zero1": ("zero1", BUCKETS),
    "zero2": ("zero2", BUCKETS),
    "zero3": ("zero3", DEEP | {PERSISTENT: 1000}),
    "zero3_released": ("zero3", DEEP | AGAIN | {PERSISTENT: 0}),
    "zero3_hpz": ("zero3", DEEP | AGAIN | {PERSISTENT: 0, "zero_hpz_partition_size": 2}),
    "zero3_offload": ("zero3_offload", DEEP | {PERSISTENT: 1000}),
    "zero2_in_parts": ("zero2", BUCKETS),
    "zero3_in_parts": ("zero3", DEEP | {PERSISTENT: 1000}),
    "zero3_released_in_parts": ("zero3", DEEP | AGAIN | {PERSISTENT: 0}),
}
PARTS = 2  # micro-batches of the variants in parts
OPERATIONS = {  # what c10d calls a collective -> what the plan calls it
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}
# An image side has its norms over the batch, a label side texts: all collectives that M3I has.
WIDE: dict[str, Any] = {"width": 192, "ffn": 768, "heads": 4}


def counted_run(world: int) -> Run:
    """M3I, small, of which weights are the larger part of memory and traffic, as in a real run."""
    run = shrink(load("m3i.demo"))
    return replace(
        run,
        batch=4 * world,
        decoder=replace(run.decoder, layers=2, **WIDE),
        text=replace(run.text, layers=2, **WIDE),
        pool=replace(run.pool, width=192),
    )


class Counter(TorchDispatchMode):
    """Bytes of new storages that live, the most of them, and what collectives carry, by name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.sent: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)
        self._known: set[int] = set()

    def know(self, tensor: Tensor, counts: bool = True) -> None:
        """Follows a tensor's storage; `counts`: its bytes are new."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        if counts:
            self.live += size
            self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, key, size * counts)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func.__name__.split(".")[0]] += 1
            self.sent[func.__name__.split(".")[0]] += largest(args)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            with suppress(RuntimeError, NotImplementedError):
                self.know(tensor)
        return out


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in tensors_in(one)] if isinstance(value, (list, tuple)) else []


def largest(arguments: Any) -> int:
    """Bytes of the larger side of a collective: all that a gather gives, all that a reduction takes."""
    sides = [tensors_in(a) for a in arguments]
    return max((sum(t.numel() * t.element_size() for t in side) for side in sides), default=0)


def existing() -> dict[int, Tensor]:
    """A tensor of every storage that Python knows tensors of."""
    gc.collect()
    found: dict[int, Tensor] = {}
    for thing in gc.get_objects():
        with suppress(Exception):
            if isinstance(thing, Tensor) and not thing.is_meta:
                found[thing.untyped_storage()._cdata] = thing
    return found


def at_rest() -> int:
    """Bytes of all these storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in existing().values())


def parts_of(name: str) -> int:
    """Micro-batches of a variant."""
    return PARTS if name.endswith("in_parts") else 1


def main(folder: Path, names: list[str]) -> None:
    from pretrain.main import quieten

    quieten()
    from pretrain.distributed import start_distributed
    from pretrain.ds_config import resolve_config
    from pretrain.engine import Engine
    from pretrain.pretrainer import Pretrainer
    from pretrain.towers import Towers

    start_distributed()
    run, results = counted_run(world_size()), {}
    for name in names:
        before = at_rest()
        file, changes = VARIANTS[name]
        ds_config = json.loads((ROOT / "ds_configs" / f"{file}.json").read_text())
        ds_config["bf16"]["enabled"] = True
        ds_config["zero_optimization"] |= changes
        config, _ = resolve_config(ds_config, run, torch.device("cpu"))
        engine = Engine(Pretrainer(run, FACTS, parts_of(name)), Towers(run, FACTS), run, config)
        batch = random_batch(run, run.images_per_rank(world_size()), seed=rank())
        for _ in range(2):  # ZeRO-3 learns the order of modules
            engine.step(batch)
        rest = at_rest() - before
        counter, backward = Counter(), list[int]()
        engine.before_move = lambda counter=counter, told=backward: told.append(counter.most)
        for tensor in existing().values():
            counter.know(tensor, counts=False)
        with counter:
            engine.step(batch)
        results[name] = {
            "at_rest": rest,
            "backward": rest + backward[0],
            "most": rest + counter.most,
            "sent": dict(counter.sent),
            "calls": dict(counter.calls),
        }
        print(name, results[name], flush=True)
        del engine
    if rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(VARIANTS))

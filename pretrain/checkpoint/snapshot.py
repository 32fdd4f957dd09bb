"""What must be copied before training may go on, and into which files does it go?"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from pretrain import provenance, randomness
from pretrain.checkpoint.image import Image
from pretrain.checkpoint.ranges import Layout, Slice, rank_name
from pretrain.checkpoint.store import Content
from pretrain.collectives import rank, world_size
from pretrain.config import Run
from pretrain.facts import DataFacts

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW; they begin the names of tensors in optimizer/


@runtime_checkable
class Owned(Protocol):
    """What a rank owns, as pretrain.zero.OwnedState, which is not imported: readers need no DeepSpeed."""

    slices: list[Slice]
    buffers: Mapping[str, Tensor]
    steps: int

    def masters(self) -> Mapping[str, Tensor]: ...

    def moments(self) -> Mapping[str, Mapping[str, Tensor]]: ...

    def begin_moments(self, steps: int) -> None: ...

    def publish(self) -> None: ...


@runtime_checkable
class Trainable(Protocol):
    """What a checkpoint needs of pretrain.engine.Engine."""

    run: Run
    stage: int
    dtype: torch.dtype
    device: torch.device
    steps_done: int
    owned: Owned
    average: Any  # ema.TeacherAverage
    balance: Any  # balance.BalanceTracker
    guard: Any  # guard.StepGuard
    before_move: Any  # called before weights change, if not None


class Snapshot:
    """Memory of this process that holds what its rank writes, taken once by a collective call."""

    def __init__(self, engine: Trainable, facts: DataFacts, tokenizer: Path | None) -> None:
        self._engine, self._facts = engine, facts
        is_pinned = engine.device.type == "cuda"
        self._stream = torch.cuda.Stream(engine.device) if is_pinned else None
        self._ready: Any = None  # when the device has made what is to be copied
        self._sources: dict[str, Mapping[str, Tensor]] = {}
        self._copied = threading.Event()
        student, teacher = engine.owned.slices, engine.average.slices
        self._images = {
            "student": _image(student, [""], is_pinned),
            "optimizer": _image(student, [f"{moment}/" for moment in MOMENTS], is_pinned),
            "teacher": _image(teacher, [""], is_pinned),
        }
        layouts = {"student": gathered_layout(student), "teacher": gathered_layout(teacher)}
        own = sum(len(image.content) for image in self._images.values())
        sizes: list[int] = [0] * world_size()
        dist.all_gather_object(sizes, own)
        self.num_bytes = sum(sizes)  # of the large files, all ranks together
        self._fixed: dict[str, Content] = {}  # files of rank 0 that are the same in every checkpoint
        self._told: dict[str, Any] = {}
        if rank() == 0:
            for whose, parameters in layouts.items():
                text = json.dumps({"world": world_size(), "dtype": "float32", "parameters": parameters})
                self._fixed[f"{whose}/layout.json"] = text.encode()
            self._fixed["run.json"] = engine.run.to_json().encode()
            self._fixed["facts.json"] = facts.to_json().encode()
            for path in sorted(tokenizer.rglob("*") if tokenizer is not None else ()):
                if path.is_file():
                    self._fixed[f"tokenizer/{path.relative_to(tokenizer).as_posix()}"] = path.read_bytes()
            self._told = {
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "hardware": provenance.hardware(engine.device),
            }

    def take(self) -> dict[str, Content]:
        """The files of this rank; what the large ones hold comes by `copy`, small ones are as they are now.

        Until it is copied nothing may change the weights: the engine calls `before_move`, which waits for that.
        """
        engine = self._engine
        steps = engine.owned.steps
        sources = {"student": engine.owned.masters(), "teacher": engine.average.state()}
        if steps:
            moments = engine.owned.moments()
            sources["optimizer"] = {f"{m}/{name}": v for m in MOMENTS for name, v in moments[m].items()}
        self._sources = sources
        self._ready = torch.cuda.current_stream(engine.device).record_event() if self._stream else None
        self._copied.clear()
        engine.before_move = self._let_move
        name = rank_name(rank())
        files: dict[str, Content] = {
            f"{kind}/{name}.safetensors": self._images[kind].content for kind in sources
        }
        files[f"random/{name}.json"] = json.dumps(randomness.states()).encode()
        return files | (self._of_first_rank(steps) if rank() == 0 else {})

    @torch.no_grad()
    def copy(self) -> None:
        """Copies the state as it was at `take` into the files; in a thread, beside forward and backward pass."""
        try:
            with torch.cuda.stream(self._stream):  # does nothing without one
                if self._stream is not None:
                    self._stream.wait_event(self._ready)
                for kind, tensors in self._sources.items():
                    views = self._images[kind].views
                    for name, tensor in tensors.items():
                        views[name].copy_(tensor, non_blocking=True)
                if self._stream is not None:
                    self._stream.synchronize()
        finally:
            self._sources = {}
            self._copied.set()

    def _let_move(self) -> None:
        """Returns when nothing reads the weights any more."""
        self._copied.wait()

    def _of_first_rank(self, steps: int) -> dict[str, Content]:
        engine = self._engine
        state = {
            "step": engine.steps_done,
            "position": engine.guard.next_batch(engine.steps_done) * engine.run.batch,  # of the next image
            "optimizer_steps": steps,
            "balance": engine.balance.state_dict(),
            "guard": engine.guard.state_dict(),
            "world": world_size(),
            "stage": engine.stage,
            "dtype": str(engine.dtype),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return self._fixed | {
            "state.json": json.dumps(state | self._told, indent=1).encode(),
            "student/buffers.safetensors": _buffers(engine.owned.buffers),
            "teacher/buffers.safetensors": _buffers(engine.average.buffers),
        }


def gathered_layout(slices: list[Slice]) -> Layout:
    """Shape and parts of every parameter, from what each rank owns of it; a collective call."""
    owned: list[list[tuple[int, int]]] = [[] for _ in range(world_size())]
    dist.all_gather_object(owned, [(part.start, part.numel) for part in slices])
    layout: Layout = {}
    for index, part in enumerate(slices):
        parts = [[r, *of_rank[index]] for r, of_rank in enumerate(owned) if of_rank[index][1]]
        layout[part.name] = {"shape": list(part.shape), "parts": parts}
    return layout


def _image(slices: list[Slice], prefixes: list[str], is_pinned: bool) -> Image:
    owned = {f"{prefix}{s.name}": s for prefix in prefixes for s in slices if s.numel}
    lengths, starts = ({k: getattr(s, what) for k, s in owned.items()} for what in ("numel", "start"))
    return Image(lengths, starts, is_pinned=is_pinned)


def _buffers(buffers: Mapping[str, Tensor]) -> bytes:
    return save({name: values.detach().cpu().contiguous() for name, values in buffers.items()})

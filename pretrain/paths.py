"""What of a start belongs to the machine and not to the recipe?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.names import checkpoints_of
from pretrain.initial.asked import Init
from pretrain.place import Place
from pretrain.watchdog import TIMEOUT


@dataclass(frozen=True)
class Paths:
    """Where everything lies, and how this machine does what the recipe asks."""

    data: dict[str, Place]  # name of a source in the recipe -> its data set
    out: Path
    ds_config: Path
    tokenizer: Path | None = None  # folder; that of the first captioned data set if None
    guide: Path | None = None  # folder of the frozen encoder that targets need
    workers: int = 0  # processes that decode for each rank; 0 = the training process itself
    checkpoints: Place | None = None  # folder or URL; a folder in `out` if None
    timeout: float = TIMEOUT  # seconds without progress before a run ends that has lost a rank
    micro_batches: int = 1  # parts of a rank's share that pass through the model one after another
    trackers: tuple[str, ...] = ()  # of pretrain.monitor.trackers, beside the log
    price: float | None = None  # of an hour of one GPU
    profile: tuple[int, int] | None = None  # first and last step that a profiler follows
    compile: bool = False  # transformer blocks by torch.compile
    evaluate_every: int = 0  # steps between two looks at the teacher; 0: none
    evaluate_data: Path | None = None  # folder of train/ and heldout/ (or val/) that it is looked at with
    init: Init | None = None  # weights that the run starts from, if any

    @property
    def kept(self) -> Place:
        """Where the checkpoints lie."""
        return checkpoints_of(self.out) if self.checkpoints is None else self.checkpoints

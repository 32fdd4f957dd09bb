"""What moves the weights of a run, and when do they not move? Optimizer, teacher, loss balance, guard; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.model_config import fraction, positive


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and cosine decay to `final_lr`."""

    lr: float = 1e-3  # peak
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; vectors (biases, norms) have none
    warmup: int = 1000  # steps
    final_lr: float = 0.0
    clip: float = 0.0  # norm of the whole gradient; 0 = no clipping

    def __post_init__(self) -> None:
        positive("optim", lr=self.lr, eps=self.eps)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must lie in [0, 1)")
        if self.warmup < 0 or self.weight_decay < 0 or self.clip < 0 or self.final_lr < 0:
            raise ValueError(f"optim.warmup, weight_decay, clip, final_lr must not be negative: {self}")


@dataclass(frozen=True)
class Teacher:
    """Momentum encoder: float32 exponential moving average of the student."""

    momentum: float = 0.995  # at step 0
    final_momentum: float = 1.0  # at the last step, reached by a cosine

    def __post_init__(self) -> None:
        fraction("teacher", momentum=self.momentum, final_momentum=self.final_momentum)


@dataclass(frozen=True)
class Balance:
    """Dynamic weight of the label losses: objective.gamma x |gradient of image losses| / |that of label losses|."""

    decay: float = 0.99  # of the moving averages of the two norms

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"balance.decay={self.decay} must lie in [0, 1)")


@dataclass(frozen=True)
class Guard:
    """When a step is refused, and what follows; a loss or gradient that is not finite always is.

    A spike is a gradient norm or a target's loss far above those of the last accepted steps: by so many robust
    deviations (1.4826 x median distance from the median; of norms, of their logarithms) and by a share of the median.
    """

    window: int = 128  # accepted steps that are the measure; nothing is a spike until there are as many
    deviations: float = 20.0  # above the median; 0 = spikes are not looked for
    norm_factor: float = 10.0  # a spike of the norm is also above so many medians
    loss_rise: float = 0.5  # a spike of a loss is also above the median by so much of its size
    skips: int = 4  # refused steps in a row before the run goes back to its last good checkpoint
    margin: int = 8  # accepted batches before them that are left out with them; twice as many each time
    rewinds: int = 3  # times that the run goes back without getting further before it ends
    evidence_gib: float = 32.0  # GiB that images of refused steps may take on the disk; 0 = none are kept

    def __post_init__(self) -> None:
        positive("guard", window=self.window, skips=self.skips)
        if self.evidence_gib < 0:
            raise ValueError(
                f"guard.evidence_gib={self.evidence_gib} must not be negative: 0 keeps no images of refused steps"
            )
        if self.deviations < 0 or self.norm_factor < 1 or self.loss_rise < 0:
            raise ValueError(
                f"guard.deviations={self.deviations} and loss_rise={self.loss_rise} must not be negative, "
                f"norm_factor={self.norm_factor} must be at least 1"
            )
        if self.margin < 0 or self.rewinds < 0:
            raise ValueError(f"guard.margin={self.margin} and rewinds={self.rewinds} must not be negative")

"""How much do the label losses weigh against the image losses? Gradient norms where both leave the encoder.

M3I paper, section 3.3: L = L_image + lambda * L_label with lambda = gamma * g_image / g_label, where g are
moving averages of the norm of the gradient that either loss sends to the encoder's output. A node with two
outputs sees both gradients in the one backward pass that training makes anyway; lambda comes from earlier
steps, so it is a constant of the step and the gradients of the heads carry it too.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pretrain.collectives import sum_over_ranks, world_size

IMAGE, LABEL = 0, 1  # positions in every pair of numbers below


class BalanceTracker:
    """Moving averages of the two gradient norms, and the weight of the label losses that follows from them.

    A plain object: buffers of a module would be cast to bfloat16. All state lives on `device` and is read
    by nothing during a step, so the device never waits. One step is: `weight` in the forward pass,
    `observe` once a fork and backward pass (squares add up over micro-batches), then `advance` once, on all
    ranks. In a step for which `is_told` is set, `watch` measures every reader of the features by itself too.
    """

    def __init__(
        self, gamma: float | None = 1.0, decay: float = 0.99, device: torch.device | str = "cpu"
    ) -> None:
        self._gamma = gamma  # None: the weight stays 1
        self._decay = decay
        self._squares = torch.zeros(2, device=device)  # of this step on this rank, the label's times weight^2
        self._averages = torch.zeros(2, device=device)  # not yet corrected for their start at zero
        self._counts = torch.zeros(2, device=device)  # steps that went into each average
        self._norms = torch.zeros(2, device=device)  # of the last step
        self._weight = torch.ones((), device=device)
        self.is_told = False  # is this step one whose readers are measured?
        self.reader_norms: dict[
            str, Tensor
        ] = {}  # of the last step that was told, as `image_norm`, by reader
        self._readers: dict[
            str, tuple[int, Tensor]
        ] = {}  # of this step: position, sum of squares on this rank

    @property
    def weight(self) -> Float[Tensor, ""]:
        """Lambda of this step, float32, without gradient; 1 until both norms have been seen."""
        return self._weight

    @property
    def image_norm(self) -> Float[Tensor, ""]:
        """Norm of the mean-over-ranks gradient of the image losses in the last step; 0 if there was none."""
        return self._norms[IMAGE]

    @property
    def label_norm(self) -> Float[Tensor, ""]:
        """The same of the label losses, before their weight."""
        return self._norms[LABEL]

    def observe(self, image: Tensor | None, label: Tensor | None) -> None:
        """Adds the squared norms of this rank's two gradients; None stands for a branch without gradient."""
        for position, gradient in ((IMAGE, image), (LABEL, label)):
            if gradient is not None:
                # Squares of bfloat16 gradients vanish below 1e-19, so the sum runs in float32.
                norm = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)
                self._squares[position] += norm * norm

    def watch(
        self, reader: str, position: int, read: Tensor, rows: Int[Tensor, " n"], mixed: int, num_inputs: int
    ) -> None:
        """Measures in the backward pass what reaches the encoder's output through `read` [n, l, d]: the features of
        the inputs `rows` // `mixed` of `num_inputs`, which images that share an input both read.
        """
        if not self.is_told or not read.requires_grad:
            return
        squares = torch.zeros((), device=read.device)
        self._readers[reader] = (position, squares)

        def measure(gradient: Tensor) -> None:
            if mixed > 1:
                summed = gradient.new_zeros(num_inputs, *gradient.shape[1:])
                gradient = summed.index_add_(0, rows // mixed, gradient)
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            squares.add_(norm * norm)

        read.register_hook(measure)

    def advance(self, told: Tensor | None = None) -> Tensor:
        """Ends the step: sums over ranks, moves the averages, sets the next weight. A collective call.

        `told` [n] is what the ranks have to tell each other besides; its sum comes back, from the same message.

        A branch whose gradient is zero or not finite leaves its average as it was: a batch without labels
        says nothing about the scale of the label losses.
        """
        told = self._squares.new_zeros(0) if told is None else told
        sums = sum_over_ranks(torch.cat([self._squares, told]))
        norms = sums[:2].sqrt() / world_size()  # the gradient is the mean over ranks
        norms = torch.stack([norms[IMAGE], norms[LABEL] / self._weight])
        self._tell_readers()
        is_seen = torch.isfinite(norms) & (norms > 0)
        self._averages = torch.where(is_seen, self._averages.lerp(norms, 1 - self._decay), self._averages)
        self._counts = self._counts + is_seen
        corrected = self._averages / (1 - self._decay**self._counts)
        if self._gamma is not None:
            weight = self._gamma * corrected[IMAGE] / corrected[LABEL]  # nan until both have been seen
            self._weight = torch.where(torch.isfinite(weight) & (weight > 0), weight, self._weight)
        self._norms = norms
        self._squares = torch.zeros_like(self._squares)
        return sums[2:]

    def moved(self) -> tuple[Tensor, ...]:
        """What `advance` replaces, as it is; `put_back` undoes the step. Costs nothing."""
        return self._averages, self._counts, self._weight

    def put_back(self, moved: tuple[Tensor, ...]) -> None:
        """The averages and the weight as they were when `moved` was asked; the squares of a refused step are gone."""
        self._averages, self._counts, self._weight = moved

    def _tell_readers(self) -> None:
        if not self._readers:
            return
        positions, squares = zip(*self._readers.values(), strict=True)
        norms = sum_over_ranks(torch.stack(squares)).sqrt() / world_size()
        each = zip(self._readers, positions, norms.unbind(), strict=True)
        self.reader_norms = {name: n / self._weight if at == LABEL else n for name, at, n in each}
        self._readers = {}

    def state_dict(self) -> dict[str, Any]:
        """Numbers that continue the averages exactly (float32 survives JSON); waits for the device."""
        return {
            "averages": self._averages.tolist(),
            "counts": self._counts.tolist(),
            "weight": self._weight.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError when `state` is not from `state_dict`."""
        self._averages = torch.tensor(state["averages"], device=self._averages.device)
        self._counts = torch.tensor(state["counts"], device=self._counts.device)
        self._weight = torch.tensor(state["weight"], device=self._weight.device)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, tracker: BalanceTracker) -> tuple[Tensor, Tensor]:
        ctx.tracker = tracker
        ctx.set_materialize_grads(False)  # a branch that nothing uses arrives as None, not as zeros
        return features.view_as(features), features.view_as(features)

    @staticmethod
    def backward(ctx: Any, image: Tensor | None, label: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.tracker.observe(image, label)
        if image is None or label is None:
            return (label if image is None else image), None
        return image + label, None


def fork(
    features: Float[Tensor, "*shape"], tracker: BalanceTracker
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """`features` twice: for the image losses, and for the label losses that are multiplied by
    `tracker.weight`.

    The backward pass adds the two gradients, as if there had been no fork, and tells the tracker their norms.
    Works without gradient too, where it is the identity.
    """
    return _Fork.apply(features, tracker)

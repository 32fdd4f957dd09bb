"""How well does the encoder tell the categories when it, or a head on it, is trained on augmented images of them, by
all ranks together?
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.optim import Lars, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pretrain.collectives import from_every_rank, rank, sum_over_ranks, world_size
from pretrain.config import Run
from pretrain.evaluate.augment import seeded
from pretrain.evaluate.evidence import NotMeasured
from pretrain.evaluate.features import IMAGES_AT_ONCE, Pictures
from pretrain.evaluate.fine_tune_inputs import Augmented, FrozenFeatures, Inputs, reseed
from pretrain.evaluate.fine_tune_order import (
    Augmentations,
    Examples,
    Reader,
    stacked,
    steps_of,
    training_batches,
)
from pretrain.evaluate.fine_tune_precision import precision_of
from pretrain.evaluate.fine_tune_recipes import LARS, WHOLE, FineTune
from pretrain.evaluate.fine_tune_state import WHAT, identity
from pretrain.evaluate.frozen import FrozenClassifier
from pretrain.evaluate.layers import UnknownOrder, decay_of_depth, layer_order, names_without_decay
from pretrain.evaluate.published_encoder import PublishedEncoder
from pretrain.models.backbone import build_encoder
from pretrain.models.drop_path import DropPath, blocks_of, set_linear
from pretrain.models.pixels import normalise
from pretrain.optim import warm_cosine
from pretrain.training_state import States

LOOKED_AT = 10  # steps between two looks at the clock
UNREAD = -1  # category of an image that could not be read


class Classifier(nn.Module):
    """Encoder, mean of its tokens, linear head without a norm: images [b, 3, s, s] -> logits [b, k].

    The encoder is a trainable copy that stays in eval mode, so that no statistics move, but for its DropPaths where
    the classifier `drops` branches. The head starts from zero.
    """

    def __init__(self, encoder: nn.Module, num_categories: int, *, drops: bool = False) -> None:
        super().__init__()
        self.precision = torch.float32  # of the passes that trained it
        self.drops = drops  # branches, in training; else the encoder's own rates are passed over
        self.encoder = copy.deepcopy(encoder).requires_grad_(True).eval()
        self.head = nn.Linear(encoder.width, num_categories)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k"]:
        return self.head(self.encoder(images).mean(dim=1))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        self.encoder.eval()
        for module in self.encoder.modules():
            if isinstance(module, DropPath):
                module.train(mode and self.drops)
        return self

    def group_matcher(self, coarse: bool) -> Callable[[str], float]:
        """Name of a parameter -> place of its layer; what `param_groups_layer_decay` of timm asks a model for."""
        order = {f"encoder.{name}": float(layer) for name, layer in layer_order(self.encoder).items()}
        return lambda name: order.get(name, math.inf)

    def groups(self, settings: FineTune) -> list[dict]:
        """Parameter groups with `lr_scale`, the rate of a layer / the recipe's."""
        exempt = {f"encoder.{name}" for name in names_without_decay(self.encoder)}
        depth = max(layer_order(self.encoder).values())
        decay = decay_of_depth(settings.layer_decay, settings.decay_depth, depth)
        head, found = {id(parameter) for parameter in self.head.parameters()}, []
        for group in param_groups_layer_decay(self, settings.weight_decay, exempt, layer_decay=decay):
            for is_head, rate in ((False, group["lr_scale"]), (True, settings.head_rate)):
                if own := [p for p in group["params"] if (id(p) in head) == is_head]:
                    found.append(group | {"params": own, "lr_scale": rate})
        return found


def fine_tune(
    towers: nn.Module,
    run: Run,
    train: Examples,
    num_categories: int,
    settings: FineTune,
    *,
    device: torch.device,
    workers: int = 0,
    title: str = "fine-tuning",
    state: Path | None = None,
) -> Classifier | FrozenClassifier:
    """The classifier after the last step; nothing is selected by held-out images.

    A collective call: the ranks share each batch. Float32, with autocast to bfloat16 on GPUs that have it. On a CPU
    one seed gives the same bits; another number of ranks rounds sums otherwise, and drops other branches where the
    recipe drops any. `towers`, which are on `device`, stay as they are. Rank 0 keeps a `state`, if one is named, from
    which the same call goes on, on any number of ranks. Raises NotMeasured when the loss is not finite and, where the
    encoder is trained, for unknown layers and for weights that are fixed; ValueError with fewer than two training
    images, for a state of another training, and when too many images cannot be read any more.
    """
    num_images = len(train.index)
    if num_images < 2:
        raise ValueError(f"{train.folder} has {num_images} labelled image, {WHAT} needs two or more")
    batch = settings.batch_of(num_images)
    an_epoch = steps_of(num_images, batch)
    steps = settings.steps(an_epoch)
    peak = settings.peak(batch)
    model = _model(towers, run, num_categories, settings).to(device).train()
    optimizer = _optimizer(model, settings, peak)
    model.precision = precision_of(model, run.views.size, device)
    told = {} if state is None else identity(towers, run, train, num_categories, settings, model.precision)
    states = States(state, told, WHAT)
    own = model if settings.trains == WHOLE else model.head
    begun, more = states.load(own, optimizer)
    losses = torch.tensor(more.get("total", 0.0) if rank() == 0 else 0.0, device=device)
    shown_as = (
        FrozenFeatures(run, model) if own is not model else Augmented(run, settings, num_categories, device)
    )
    trained = _joint(own, device)
    reader = Reader(Augmentations(Pictures(train.folder, run.views.size), run, settings), run.max_bad)
    bar = tqdm(total=steps, initial=begun, desc=title, unit=" step", mininterval=1.0, disable=rank() > 0)
    with seeded(settings.seed), bar:
        found = training_batches(train, run, settings, batch, begun, workers, reader)
        for step, shown in enumerate(found, begun):
            _set_rate(optimizer, warm_cosine(step, steps, round(settings.warmup * steps), peak, 0.0))
            inputs = shown_as(shown, step, step // an_epoch)
            reseed(settings.seed, step, rank())  # of branches that are dropped
            loss = _share_of_loss(trained, inputs, model.precision) / batch
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.detach() / world_size()
            bar.update()
            is_last = step + 1 == steps
            if is_last or (step + 1) % an_epoch == 0:
                _end_epoch(losses, step % an_epoch + 1, step // an_epoch + 1, bar)
            if (is_last or step % LOOKED_AT == 0) and states.is_due(is_last):
                states.save(own, None if is_last else optimizer, step + 1, {"total": _on_first_rank(losses)})
    return model.eval()


def _model(
    towers: nn.Module, run: Run, num_categories: int, settings: FineTune
) -> Classifier | FrozenClassifier:
    if settings.trains == WHOLE:
        if isinstance(towers.encoder, PublishedEncoder) and towers.encoder.fixed:
            raise NotMeasured(towers.encoder.fixed)
        encoder = encoder_of(towers, run, settings.drop_path)
        return Classifier(encoder, num_categories, drops=settings.drop_path > 0)
    with seeded(settings.seed):
        return FrozenClassifier(towers.encoder, num_categories, settings.trains)


def _optimizer(
    model: Classifier | FrozenClassifier, settings: FineTune, peak: float
) -> torch.optim.Optimizer:
    try:
        groups = model.groups(settings)
    except UnknownOrder as error:
        raise NotMeasured(f"each layer has a rate of its own, and {error}") from error
    if settings.optimizer == LARS:
        return Lars(groups, lr=peak, momentum=settings.betas[0])
    return torch.optim.AdamW(groups, lr=peak, betas=settings.betas)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def _on_first_rank(losses: Float[Tensor, ""]) -> float:
    """Sum of the ranks' losses, which the first one has afterwards, as after a load."""
    total = float(sum_over_ranks(losses))
    losses.fill_(total if rank() == 0 else 0.0)
    return total


def _share_of_loss(trained: nn.Module, inputs: Inputs, precision: torch.dtype) -> Float[Tensor, ""]:
    """Sum of this rank's cross-entropies in nats, times the ranks: the mean of its gradients over them, which DDP
    takes, is that of the sum over the batch of all.
    """
    with torch.autocast(inputs.values.device.type, precision, enabled=precision != torch.float32):
        logits = trained(inputs.values)
    of_each = F.cross_entropy(logits.float(), inputs.targets, reduction="none")
    return (of_each * inputs.counts).sum() * world_size()


def _end_epoch(losses: Float[Tensor, ""], steps: int, epoch: int, bar: tqdm) -> None:
    """Shows the mean loss of an epoch and begins anew; NotMeasured where it is not finite."""
    mean = float(sum_over_ranks(losses)) / steps
    if not math.isfinite(mean):
        raise NotMeasured(f"the loss of fine-tuning was {mean} in epoch {epoch}")
    bar.set_postfix_str(f"epoch {epoch}, {mean:.3f} nats")
    losses.zero_()


def _joint(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, whose gradients are the mean over the ranks; alone itself."""
    if world_size() == 1:
        return model
    # A published trunk may have weights that no token depends on.
    places = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=places, broadcast_buffers=False, find_unused_parameters=True
    )


def require_blocks(towers: nn.Module, drop_path: float) -> None:
    """ValueError unless the encoder has a place where branches can be dropped, if they shall be.

    One whose weights are not trained is not refused: its row says so.
    """
    encoder = towers.encoder
    if not drop_path or not isinstance(encoder, PublishedEncoder) or encoder.fixed:
        return
    if not blocks_of(encoder.trunk):
        raise ValueError(
            f"a recipe of fine-tuning with drop_path={drop_path} needs blocks that drop branches, and "
            f"{type(encoder.trunk).__name__} has none: fine-tune it by --fine-tune-recipe small"
        )


def encoder_of(towers: nn.Module, run: Run, drop_path: float) -> nn.Module:
    """The towers' encoder, another one where it shall drop branches. ValueError where it has no place for that."""
    if not drop_path:
        return towers.encoder
    if isinstance(towers.encoder, PublishedEncoder):
        require_blocks(towers, drop_path)
        published = copy.deepcopy(towers.encoder)
        set_linear(published.trunk, drop_path)
        return published
    backbone = replace(run.backbone, drop_path=drop_path, drop_path_schedule="linear")
    with seeded(0):  # of weights that are overwritten
        encoder = build_encoder(backbone, run.views.size).eval()
    encoder.fold_norm()
    encoder.load_state_dict(towers.encoder.state_dict())
    return encoder


@torch.inference_mode()
def predict(
    model: Classifier | FrozenClassifier,
    run: Run,
    heldout: Examples,
    *,
    device: torch.device,
    workers: int = 0,
) -> Int[Tensor, " n"]:
    """Categories that the classifier says of the center views of the examples, in their order; float32.

    A collective call: each rank sees a share, all get the whole. UNREAD, which is always wrong, of an image that
    cannot be read any more; DataError when they are too many.
    """
    reader = Reader(Pictures(heldout.folder, run.views.size), run.max_bad)
    index = heldout.index.tolist()
    # As many shares on each rank, some of which may be shorter.
    at_once = IMAGES_AT_ONCE * world_size()
    rows = [index[start : start + at_once] for start in range(0, len(index), at_once)]
    own = [row[rank() * len(row) // world_size() : (rank() + 1) * len(row) // world_size()] for row in rows]
    predicted: list[tuple[int, int]] = []
    for pictures, share in zip(reader.batches(own, at_once, workers), own, strict=True):
        if not share:
            continue
        shown = stacked(pictures, run.views.size, share)
        images = normalise(shown.views.to(device), run.views.mean, run.views.std, torch.float32)
        said = model(images).argmax(dim=1).cpu().where(shown.counts, torch.tensor(UNREAD))
        predicted += zip(share, said.tolist(), strict=True)
    by_number = dict(from_every_rank(predicted))
    return torch.tensor([by_number[number] for number in index])

"""What do probes say that are trained step by step, or on few labels? Their rows of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pretrain.collectives import all_rows, sum_over_ranks
from pretrain.evaluate import attentive, cached, few_shot, heads, knn, linear
from pretrain.evaluate.accuracy import score
from pretrain.evaluate.divided import division, share_of_right
from pretrain.evaluate.evidence import Evidence, NotMeasured, Outcome, heldout_labels, is_labelled
from pretrain.evaluate.features import Features
from pretrain.evaluate.fine_tune_recipes import images_of_step

ALL_LAYERS = "all layers"  # name of the last layers' means side by side
RATES = heads.RATES
ATTENTIVE = attentive.AttentiveRecipe()


def linear_lars(evidence: Evidence) -> Outcome:
    """The mean token under the paper's recipe and rate, but for its crops and flips; nothing chosen."""
    truth, num_categories = heldout_labels(evidence), len(evidence.categories)
    train, labels = _labelled({"tokens": evidence.train.tokens}, evidence.train)
    heldout, _ = _labelled({"tokens": evidence.heldout.tokens}, evidence.heldout)
    head = heads.train_heads(train, labels, num_categories, [heads.PAPER.lr], heads.PAPER, evidence.device)[0]
    predicted = all_rows(head.predict(heldout))
    settings = {"feature": "tokens", "recipe": _told(division(len(labels)).total)}
    return Outcome(score(predicted, truth, num_categories) | settings, predicted)


def linear_sweep(evidence: Evidence) -> Outcome:
    """The best of all features and rates, as chosen by a part of the training images and trained again on all."""
    truth, num_categories = heldout_labels(evidence), len(evidence.categories)
    if not evidence.train.layers:
        raise NotMeasured("the model does not tell the order of its layers, among which this probe chooses")
    train, labels = _labelled(choices(evidence.train), evidence.train)
    heldout, _ = _labelled(choices(evidence.heldout), evidence.heldout)
    fit, chosen_by, num_chosen_by = _split(labels)
    some = {name: values[fit] for name, values in train.items()}
    tried = heads.train_heads(some, labels[fit], num_categories, RATES, heads.PAPER, evidence.device)
    others = {name: values[chosen_by] for name, values in train.items()}
    right = [share_of_right(head.predict(others), labels[chosen_by]) for head in tried]
    best = tried[max(range(len(tried)), key=right.__getitem__)]
    only = {best.feature: train[best.feature]}
    head = heads.train_heads(only, labels, num_categories, [best.lr], heads.PAPER, evidence.device)[0]
    predicted = all_rows(head.predict(heldout))
    settings = {
        "feature": best.feature,
        "lr": best.lr,
        "recipe": _told(division(len(labels)).total),
        "chosen_by": num_chosen_by,  # training images
        "tried": [
            {"feature": h.feature, "lr": h.lr, "train_split_accuracy": value}
            for h, value in zip(tried, right, strict=True)
        ],
    }
    return Outcome(score(predicted, truth, num_categories) | settings, predicted)


def choices(features: Features) -> dict[str, Float[Tensor, "n _"]]:
    """The vectors of an image that a sweep chooses among, by name."""
    found = {"tokens": features.tokens} | features.layers
    if features.embedding is not None:
        found["embedding"] = features.embedding
    if len(features.layers) > 1:
        found[ALL_LAYERS] = torch.cat(list(features.layers.values()), dim=1)
    return found


def attentive_probe(evidence: Evidence) -> Outcome:
    """The probe at the rate that a part of the training images chooses, trained again on all of them."""
    heldout_labels(evidence)
    (train, labels), (heldout, truth) = (_cached(split) for split in (evidence.train, evidence.heldout))
    num_categories, device = len(evidence.categories), evidence.device
    fit, chosen_by, _ = _split(labels)
    tried = attentive.train_attentive(
        train[fit], labels[fit], num_categories, ATTENTIVE.rates, ATTENTIVE, device
    )
    right = [share_of_right(attentive.predict(p, train[chosen_by], device), labels[chosen_by]) for p in tried]
    rate = ATTENTIVE.rates[max(range(len(right)), key=right.__getitem__)]
    probe = attentive.train_attentive(train, labels, num_categories, [rate], ATTENTIVE, device)[0]
    predicted, truth = all_rows(attentive.predict(probe, heldout, device)), all_rows(truth)
    settings = {
        "feature": "all tokens",
        "lr": rate,
        "recipe": asdict(ATTENTIVE),
        "train_images": division(len(labels)).total,
        "labelled_images": int(sum_over_ranks(is_labelled(evidence.train).sum())),  # of which tokens are kept
        "most_bytes": cached.MOST_BYTES,  # of the kept ones
        "tried": dict(zip(map(str, ATTENTIVE.rates), right, strict=True)),
    }
    return Outcome(score(predicted, truth, num_categories) | settings)


def few_shot_knn(evidence: Evidence, share: int) -> Outcome:
    num_categories = len(evidence.categories)

    def predict(train: Tensor, labels: Tensor, heldout: Tensor) -> Tensor:
        k = min(evidence.ks[0], division(len(labels)).total)
        return knn.votes_of_all(train, labels, heldout, [k], num_categories, evidence.device)[k]

    return Outcome(_over_draws(evidence, share, predict))


def few_shot_linear(evidence: Evidence, share: int) -> Outcome:
    def predict(train: Tensor, labels: Tensor, heldout: Tensor) -> Tensor:
        return all_rows(linear.linear_probe(train, labels, heldout, evidence.device))

    found = _over_draws(evidence, share, predict)
    solver = linear.solver_of(found["train_images"], evidence.train.tokens.shape[1])
    return Outcome(found | {"c": linear.C, "solver": solver})


def _over_draws(
    evidence: Evidence, share: int, predict: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """`few_shot.over_draws` of the mean token, where `predict` is given this rank's part of what is drawn and of the
    held-out images, and says the categories of all of these.
    """
    truth, num_categories = heldout_labels(evidence), len(evidence.categories)
    train, labels = _labelled({"tokens": evidence.train.tokens}, evidence.train)
    heldout, _ = _labelled({"tokens": evidence.heldout.tokens}, evidence.heldout)
    divided = division(len(labels))

    def of_rows(rows: Tensor, seed: int) -> Tensor:
        own = divided.own(rows)
        return predict(train["tokens"][own], labels[own], heldout["tokens"])

    found = few_shot.over_draws(all_rows(labels), share, truth, of_rows, num_categories)
    return found | {"feature": "tokens"}


def _split(labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """This rank's rows to train on and to choose by, and how many all ranks choose by. A collective call."""
    divided = division(len(labels))
    fit, chosen_by = heads.selection_split(all_rows(labels))
    if not len(chosen_by):
        raise NotMeasured("no category has two training images, so that there is nothing to choose by")
    return divided.own(fit), divided.own(chosen_by), len(chosen_by)


def _labelled(found: dict[str, Tensor], features: Features) -> tuple[dict[str, Tensor], Tensor]:
    rows = is_labelled(features)
    return {name: values[rows] for name, values in found.items()}, features.labels[rows]


def _cached(features: Features) -> tuple[Tensor, Tensor]:
    """Tokens and labels of this rank's images that have both."""
    if features.cached is None:
        raise NotMeasured("no tokens were kept")
    label_of = dict(zip(features.index.tolist(), features.labels.tolist(), strict=True))
    numbers = features.cached.index.tolist()
    labels = torch.tensor([label_of[number] for number in numbers], dtype=torch.long)
    rows = (labels >= 0).nonzero()[:, 0]
    if not division(len(rows)).total:
        raise NotMeasured("none of the images whose tokens were kept has a category")
    return features.cached.tokens[rows], labels[rows]


def _told(num_images: int) -> dict[str, Any]:
    return asdict(heads.PAPER) | {"batch": images_of_step(num_images, heads.PAPER.batch, heads.PAPER.batches)}

"""What is measured of one checkpoint? One entry a row of the result; each reads features, none runs the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from pretrain.data.batch import NO_CATEGORY
from pretrain.evaluate import dense, knn, linear, retrieval, zero_shot
from pretrain.evaluate.accuracy import proportion, score
from pretrain.evaluate.features import Features
from pretrain.evaluate.regions import score_regions
from pretrain.evaluate.templates import AUTO, choose_templates
from pretrain.facts import DataFacts


class NotMeasured(Exception):
    """A probe has nothing to measure here; the message says why, and stands in the result."""


@dataclass(frozen=True)
class Evidence:
    """What every probe may read."""

    train: Features
    heldout: Features
    categories: tuple[str, ...]  # of the data set, train and held-out alike
    facts: DataFacts  # of the run
    ks: tuple[int, ...]  # neighbours of kNN; the first stands for the row
    encode: zero_shot.Encode | None  # the run's tokenizer; None without text
    embed: zero_shot.EmbedTexts  # the run's text tower
    templates: str = AUTO  # of zero-shot classification


@dataclass(frozen=True)
class Outcome:
    record: dict[str, Any]  # of the JSON result
    predicted: Int[Tensor, " n"] | None = None  # for the labelled held-out images, in their order


def _knn(evidence: Evidence, feature: str) -> Outcome:
    _check_trained(evidence, feature)
    rows, labels = is_labelled(evidence.train), heldout_labels(evidence)
    train, heldout = getattr(evidence.train, feature)[rows], _of_labelled(evidence, feature)
    num_categories = len(evidence.categories)
    predicted = knn.votes(train, evidence.train.labels[rows], heldout, evidence.ks, num_categories)
    by_k = {
        k: score(predicted[k], labels, num_categories) if k in predicted else _too_many(k, len(train))
        for k in evidence.ks
    }
    settings = {"feature": feature, "k": evidence.ks[0], "temperature": knn.TEMPERATURE}
    by_name = {str(k): row for k, row in by_k.items()}
    return Outcome(by_k[evidence.ks[0]] | settings | {"by_k": by_name}, predicted.get(evidence.ks[0]))


def _too_many(k: int, num_images: int) -> dict[str, Any]:
    return {
        "accuracy": None,
        "reason": f"k={k} is more than the {num_images} labelled training images: give smaller --k",
    }


def _check_trained(evidence: Evidence, feature: str) -> None:
    if getattr(evidence.heldout, feature) is None:
        raise NotMeasured(f"the run's targets train no {feature}")


def _linear(evidence: Evidence, feature: str) -> Outcome:
    _check_trained(evidence, feature)
    rows, labels = is_labelled(evidence.train), heldout_labels(evidence)
    train, heldout = getattr(evidence.train, feature)[rows], _of_labelled(evidence, feature)
    predicted = linear.linear_probe(train, evidence.train.labels[rows], heldout)
    settings = {"feature": feature, "c": linear.C}
    return Outcome(score(predicted, labels, len(evidence.categories)) | settings, predicted)


def _zero_shot(evidence: Evidence) -> Outcome:
    labels, encode = heldout_labels(evidence), _encoder(evidence)
    name, templates, names = choose_templates(evidence.templates, evidence.categories)
    classes = zero_shot.class_vectors(names, encode, evidence.embed, templates)
    images = _of_labelled(evidence, "projected")
    predicted = zero_shot.classify(images, classes)
    settings = {
        "feature": "projected",
        "templates": name,
        "prompts": [template.text for template in templates],
        "top5": proportion(zero_shot.count_top(images, classes, labels, 5), len(labels)),
    }
    return Outcome(score(predicted, labels, len(evidence.categories)) | settings, predicted)


def _classifier(evidence: Evidence) -> Outcome:
    """The run's own category head: only where the data set has the categories that it was trained on."""
    if not evidence.facts.categories:
        raise NotMeasured("the run has no categories")
    labels = heldout_labels(evidence)
    if set(evidence.facts.categories) != set(evidence.categories):
        odd = sorted(set(evidence.facts.categories) ^ set(evidence.categories))
        raise NotMeasured(
            f"the run was trained on other categories: {len(odd)} names stand on one side only, such as {odd[:3]}"
        )
    # The same names may be numbered differently in the run and in the data set.
    numbers = torch.tensor([evidence.categories.index(name) for name in evidence.facts.categories])
    predicted = numbers[_of_labelled(evidence, "classified")]
    return Outcome(score(predicted, labels, len(evidence.categories)) | {"feature": "embedding"}, predicted)


def _retrieval(evidence: Evidence, query: str) -> Outcome:
    """Recall among the first held-out images with captions, from images to captions or back."""
    encode = _encoder(evidence)
    rows = [row for row, captions in enumerate(evidence.heldout.captions) if captions]
    rows = rows[: retrieval.MAX_IMAGES]
    if len(rows) < 2:
        raise NotMeasured("the held-out images have no captions")
    owned = [evidence.heldout.captions[row] for row in rows]
    captions = [text for texts in owned for text in texts]
    images = evidence.heldout.projected[rows]
    texts = zero_shot.embed_captions(captions, encode, evidence.embed)
    is_match = retrieval.matches(owned)
    if query == "image":
        ranks = retrieval.ranks(images, texts, is_match)
    else:
        is_match = is_match.T
        ranks = retrieval.ranks(texts, images, is_match)
    recall = {
        str(top): proportion(int((ranks < top).sum()), len(ranks))
        | {"chance": retrieval.chance(is_match, top)}
        for top in retrieval.TOPS
    }
    counts = {"query": query, "images": len(rows), "captions": len(captions)}
    return Outcome(recall["1"] | counts | {"recall": recall})


def _dense(evidence: Evidence) -> Outcome:
    train, heldout = evidence.train.dense, evidence.heldout.dense
    if train is None or heldout is None:
        raise NotMeasured("the data set has no masks")
    if not train.kinds:
        raise NotMeasured("the masks of the training images show nothing but ground")
    counts, names = dense.dense_probe(train, heldout)
    settings = {
        "feature": "single tokens",
        "train_images": len(train.tokens),
        "train_tokens": train.places.numel(),
        "most_images": {"train": dense.TRAIN.images, "heldout": dense.HELDOUT.images},
        "penalty": dense.PENALTY,
    }
    return Outcome(score_regions(counts, names) | settings)


@dataclass(frozen=True)
class Probe:
    title: str
    measure: Callable[[Evidence], Outcome]


PROBES: dict[str, Probe] = {
    "knn": Probe("kNN, mean token", lambda evidence: _knn(evidence, "tokens")),
    "knn_embedding": Probe("kNN, pooled embedding", lambda evidence: _knn(evidence, "embedding")),
    "linear": Probe("linear probe, mean token", lambda evidence: _linear(evidence, "tokens")),
    "linear_embedding": Probe(
        "linear probe, pooled embedding", lambda evidence: _linear(evidence, "embedding")
    ),
    "dense": Probe("dense probe, mIoU", _dense),
    "classifier": Probe("own category head", _classifier),
    "zero_shot": Probe("zero-shot by class names", _zero_shot),
    "retrieval_image": Probe("image to caption, R@1", lambda evidence: _retrieval(evidence, "image")),
    "retrieval_text": Probe("caption to image, R@1", lambda evidence: _retrieval(evidence, "text")),
}


# Row of the result -> how it is shown. Fine-tuning is no probe: it runs the images.
TITLES = {name: probe.title for name, probe in PROBES.items()} | {"fine_tune": "fine-tuned"}


def measure(evidence: Evidence, names: Sequence[str] = tuple(PROBES)) -> dict[str, Outcome]:
    """The outcomes of the named probes; {"accuracy": None, "reason": ...} where one has nothing to measure."""
    outcomes = {}
    bar = tqdm(names, desc="probes", unit=" probe")
    for name in bar:
        bar.set_postfix_str(PROBES[name].title)
        outcomes[name] = outcome_of(partial(PROBES[name].measure, evidence))
    return outcomes


def outcome_of(measurement: Callable[[], Outcome]) -> Outcome:
    """What a measurement gives, or the reason why it gives nothing."""
    try:
        return measurement()
    except NotMeasured as reason:
        return Outcome({"accuracy": None, "reason": str(reason)})


def _encoder(evidence: Evidence) -> zero_shot.Encode:
    if evidence.encode is None:
        raise NotMeasured("the run has no text tower: none of its sources has captions")
    return evidence.encode


def heldout_labels(evidence: Evidence) -> Int[Tensor, " n"]:
    """Categories of the labelled held-out images."""
    for split in (evidence.train, evidence.heldout):
        if not evidence.categories or not is_labelled(split).any():
            raise NotMeasured("the data set has no categories")
    return evidence.heldout.labels[is_labelled(evidence.heldout)]


def _of_labelled(evidence: Evidence, feature: str) -> Tensor:
    return getattr(evidence.heldout, feature)[is_labelled(evidence.heldout)]


def is_labelled(split: Features) -> Tensor:
    return split.labels != NO_CATEGORY

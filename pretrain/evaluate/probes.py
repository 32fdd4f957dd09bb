"""What is measured of one checkpoint? One entry a row of the result; each reads features, none runs the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.collectives import all_rows, from_every_rank, rank, sum_over_ranks
from pretrain.evaluate import dense, knn, linear, probing, retrieval, zero_shot
from pretrain.evaluate.accuracy import clustered, proportion, score
from pretrain.evaluate.divided import division
from pretrain.evaluate.evidence import (
    Evidence,
    NotMeasured,
    Outcome,
    check_trained,
    heldout_labels,
    is_labelled,
    not_finite,
    of_labelled,
    outcome_of,
    unmeasured,
)
from pretrain.evaluate.features import LAYERS, MASKED, TOKENS
from pretrain.evaluate.published_texts import NONE
from pretrain.evaluate.regions import score_regions
from pretrain.evaluate.rows import DEFAULT, TITLES
from pretrain.evaluate.templates import choose_templates


def _knn(evidence: Evidence, feature: str) -> Outcome:
    check_trained(evidence, feature)
    rows, labels = is_labelled(evidence.train), heldout_labels(evidence)
    train, heldout = getattr(evidence.train, feature)[rows], of_labelled(evidence, feature)
    num_categories, num_images = len(evidence.categories), division(len(train)).total
    predicted = knn.votes_of_all(
        train, evidence.train.labels[rows], heldout, evidence.ks, num_categories, evidence.device
    )
    by_k = {
        k: score(predicted[k], labels, num_categories) if k in predicted else _too_many(k, num_images)
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


def _linear(evidence: Evidence, feature: str) -> Outcome:
    check_trained(evidence, feature)
    rows, labels = is_labelled(evidence.train), heldout_labels(evidence)
    train, heldout = getattr(evidence.train, feature)[rows], of_labelled(evidence, feature)
    predicted = all_rows(linear.linear_probe(train, evidence.train.labels[rows], heldout, evidence.device))
    solver = linear.solver_of(division(len(train)).total, train.shape[1])
    settings = {"feature": feature, "c": linear.C, "solver": solver}
    return Outcome(score(predicted, labels, len(evidence.categories)) | settings, predicted)


def _zero_shot(evidence: Evidence) -> Outcome:
    labels, encode = heldout_labels(evidence), _encoder(evidence)
    name, templates, names = choose_templates(evidence.templates, evidence.categories)
    images = of_labelled(evidence, "projected")
    vectors_of = partial(zero_shot.class_vectors, encode=encode, embed=evidence.embed, templates=templates)
    classes = _texts(vectors_of, names, images.shape[1])
    predicted = all_rows(zero_shot.classify(images, classes))
    own_labels = evidence.heldout.labels[is_labelled(evidence.heldout)]
    own_top5 = zero_shot.count_top(images, classes, own_labels, 5)
    settings = {
        "feature": "projected",
        "templates": name,
        "prompts": [template.text for template in templates],
        "top5": proportion(int(sum_over_ranks(torch.tensor(own_top5))), len(labels)),
    }
    return Outcome(score(predicted, labels, len(evidence.categories)) | settings, predicted)


def _classifier(evidence: Evidence) -> Outcome:
    """The run's own category head: only where the data set has the categories that it was trained on."""
    if not evidence.facts.categories:
        raise NotMeasured(evidence.without_heads or "the run has no categories")
    labels = heldout_labels(evidence)
    if set(evidence.facts.categories) != set(evidence.categories):
        odd = sorted(set(evidence.facts.categories) ^ set(evidence.categories))
        raise NotMeasured(
            f"the run was trained on other categories: {len(odd)} names stand on one side only, such as {odd[:3]}"
        )
    # The same names may be numbered differently in the run and in the data set.
    numbers = torch.tensor([evidence.categories.index(name) for name in evidence.facts.categories])
    predicted = all_rows(numbers[of_labelled(evidence, "classified")])
    return Outcome(score(predicted, labels, len(evidence.categories)) | {"feature": "embedding"}, predicted)


def _retrieval(evidence: Evidence, query: str) -> Outcome:
    """Recall among held-out images with captions, from images to captions or back."""
    owned, num_captioned, images, texts = _captioned(evidence)
    galleries = retrieval.galleries(owned, evidence.retrieval_images)
    found, of_chance = [], dict.fromkeys(retrieval.TOPS, 0.0)
    for of_images, of_texts in galleries:
        is_match = retrieval.matches(owned[of_images])
        queries, candidates = images[of_images], texts[of_texts]
        if query == "text":
            is_match, queries, candidates = is_match.turned, candidates, queries
        found.append(retrieval.ranks(queries, candidates, is_match))
        for top in retrieval.TOPS:
            of_chance[top] += retrieval.chance(is_match, top) * len(queries)
    ranks = torch.cat(found)
    # Captions of one image are found or missed together: as queries they are no independent draws.
    sizes = None if query == "image" or len(texts) == len(owned) else torch.tensor([*map(len, owned)])
    recall = {
        str(top): _recall(ranks < top, sizes) | {"chance": of_chance[top] / len(ranks)}
        for top in retrieval.TOPS
    }
    told = {
        "query": query,
        "images": len(owned),  # of all galleries
        "galleries": len(galleries),
        "captions": len(texts),
        "captioned_images": num_captioned,  # of which those are the first
        "most_images": evidence.retrieval_images,  # in a gallery
    }
    return Outcome(recall["1"] | told | {"recall": recall})


def _recall(is_found: Tensor, sizes: Tensor | None) -> dict[str, Any]:
    """Share of the queries found, of which `sizes` in turn are of one image; None: each of another."""
    if sizes is None:
        return proportion(int(is_found.sum()), len(is_found))
    image = torch.arange(len(sizes)).repeat_interleave(sizes)
    return clustered(torch.zeros_like(sizes).index_add(0, image, is_found.long()), sizes)


def _captioned(evidence: Evidence) -> tuple[list[tuple[str, ...]], int, Tensor, Tensor]:
    """Captions of the images of all galleries, of how many that have some, and the vectors of both; of all ranks,
    and embedded once for both ways.
    """
    if "captioned" not in evidence.kept:
        encode = _encoder(evidence)
        rows = [row for row, captions in enumerate(evidence.heldout.captions) if captions]
        num_captioned = division(len(rows)).total
        if num_captioned < 2:
            raise NotMeasured("the held-out images have no captions")
        most = retrieval.num_judged(num_captioned, evidence.retrieval_images)
        rows = rows[:most]
        owned = from_every_rank([evidence.heldout.captions[row] for row in rows])[:most]
        images = all_rows(evidence.heldout.projected[rows])[:most]
        captions = [text for texts in owned for text in texts]
        vectors_of = partial(zero_shot.embed_captions, encode=encode, embed=evidence.embed)
        texts = _texts(vectors_of, captions, images.shape[1])
        evidence.kept["captioned"] = owned, num_captioned, images, texts
    return evidence.kept["captioned"]


def _texts(work: Callable[[Sequence[str]], Tensor], texts: Sequence[str], width: int) -> Tensor:
    """`zero_shot.by_all_ranks`; NotMeasured, on all ranks, for vectors that are not finite."""
    vectors = zero_shot.by_all_ranks(work, texts, width)
    if num_bad := int((~vectors.isfinite().all(dim=1)).sum()):
        raise NotMeasured(
            f"the vectors of {num_bad} of {len(vectors)} texts are not finite: the training has diverged, or the "
            "checkpoint is damaged; name another one"
        )
    return vectors


def _dense(evidence: Evidence) -> Outcome:
    train, heldout = evidence.train.dense, evidence.heldout.dense
    if train is None or heldout is None:
        raise NotMeasured("the data set has no masks")
    if not from_every_rank(train.kinds):
        raise NotMeasured("the masks of the training images show nothing but ground")
    counts, names = dense.dense_probe(train, heldout)
    settings = {
        "feature": "single tokens",
        "train_images": division(len(train.tokens)).total,
        "train_tokens": division(train.places.numel()).total,
        "most_images": {"train": dense.TRAIN.images, "heldout": dense.HELDOUT.images},
        "penalty": dense.PENALTY,
    }
    return Outcome(score_regions(counts, names) | settings)


@dataclass(frozen=True)
class Probe:
    measure: Callable[[Evidence], Outcome]
    reads: frozenset[str] = frozenset()  # what `extract` has to keep for it


PROBES: dict[str, Probe] = {  # those of rows.PROBES
    "knn": Probe(lambda evidence: _knn(evidence, "tokens")),
    "knn_embedding": Probe(lambda evidence: _knn(evidence, "embedding")),
    "linear": Probe(lambda evidence: _linear(evidence, "tokens")),
    "linear_embedding": Probe(lambda evidence: _linear(evidence, "embedding")),
    "linear_lars": Probe(probing.linear_lars),
    "linear_sweep": Probe(probing.linear_sweep, reads=frozenset({LAYERS})),
    "attentive": Probe(probing.attentive_probe, reads=frozenset({TOKENS})),
    "few_shot_1_knn": Probe(partial(probing.few_shot_knn, share=1)),
    "few_shot_1_linear": Probe(partial(probing.few_shot_linear, share=1)),
    "few_shot_10_knn": Probe(partial(probing.few_shot_knn, share=10)),
    "few_shot_10_linear": Probe(partial(probing.few_shot_linear, share=10)),
    "dense": Probe(_dense, reads=frozenset({MASKED})),
    "classifier": Probe(_classifier),
    "zero_shot": Probe(_zero_shot),
    "retrieval_image": Probe(lambda evidence: _retrieval(evidence, "image")),
    "retrieval_text": Probe(lambda evidence: _retrieval(evidence, "text")),
}


def measure(evidence: Evidence, names: Sequence[str] = DEFAULT) -> dict[str, Outcome]:
    """The outcomes of the named probes; {"accuracy": None, "reason": ...} where one has nothing to measure.

    A collective call: all ranks measure the probes together, in one order, and get the same outcomes.
    """
    outcomes, unreadable = {}, not_finite(evidence)
    bar = tqdm(names, desc="probes", unit=" probe", disable=rank() > 0)
    for name in bar:
        bar.set_postfix_str(TITLES[name])
        measurement = partial(PROBES[name].measure, evidence)
        outcomes[name] = unmeasured(unreadable) if unreadable else outcome_of(measurement)
    return outcomes


def _encoder(evidence: Evidence) -> zero_shot.Encode:
    if evidence.encode is None and evidence.facts.vocab_size:
        raise NotMeasured("the export holds no tokenizer: export the run again, or name the run")
    if evidence.encode is None:
        raise NotMeasured(
            f"{evidence.without_text or NONE}: it takes a run some of whose data has captions, or a CLIP"
        )
    return evidence.encode

"""Do zero-shot classification and retrieval say what open_clip and hand calculation say?"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip_train.zero_shot
import pytest
import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from open_clip_train.train import get_clip_metrics
from timm.data import ImageNetInfo

from pretrain.evaluate import retrieval, zero_shot
from pretrain.evaluate.accuracy import CLUSTERED, clustered, wilson
from pretrain.evaluate.evidence import Evidence, NotMeasured
from pretrain.evaluate.features import Features
from pretrain.evaluate.probes import PROBES
from pretrain.evaluate.rows import MOST_IMAGES
from pretrain.evaluate.templates import AUTO, IMAGENET, PLAIN, PROMPTS, choose_templates
from pretrain.facts import DataFacts


class Texts:
    """A text tower that knows no word: a random vector a byte, their mean the caption's."""

    def __init__(self) -> None:
        self.table = torch.randn(256, 12, generator=torch.Generator().manual_seed(0))

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """As open_clip's tokenizers."""
        return torch.stack([self.encode(text)[0] for text in texts])

    def encode(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor(list(text.encode())[:100])
        return F.pad(tokens, (0, 100 - len(tokens))), torch.ones(100, dtype=torch.bool)

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        """As open_clip's models."""
        assert normalize
        return F.normalize(self.table[tokens].mean(dim=1), dim=1)

    def embed(self, tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return self.encode_text(tokens, True)


@pytest.mark.parametrize("of_open_clip", [True, False])
def test_imagenet_zero_shot_agrees_with_open_clip(
    of_open_clip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, synsets = Texts(), ImageNetInfo().label_names()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).tolist()
    if of_open_clip:
        categories = [IMAGENET_CLASSNAMES[i].replace(" ", "_") for i in order]
    else:
        categories = [synsets[i] for i in order]
    chosen, templates, names = choose_templates(AUTO, categories)
    expected = tuple(IMAGENET_CLASSNAMES[i] for i in order)
    assert chosen == IMAGENET and len(templates) == 80 and names == expected
    some = names[:40]
    theirs = build_zero_shot_classifier(texts, texts, some, OPENAI_IMAGENET_TEMPLATES).T
    ours = zero_shot.class_vectors(some, texts.encode, texts.embed, templates)
    torch.testing.assert_close(ours, theirs)
    images = F.normalize(torch.randn(200, 12, generator=torch.Generator().manual_seed(2)), dim=1)
    labels = torch.arange(200) % 40
    # Its accuracy makes a float of an array of one number, which numpy refuses since 2.4 (numpy/numpy#10615).
    monkeypatch.setattr(open_clip_train.zero_shot, "float", lambda array: array.item(), raising=False)
    settings = SimpleNamespace(device="cpu", precision="fp32", batch_size=64)
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    model = lambda image: {"image_features": image}  # noqa: E731  of open_clip, whose images are features here
    top1, top5 = open_clip_train.zero_shot.run(model, theirs.T, batches, settings)
    assert (zero_shot.classify(images, ours) == labels).sum() == round(200 * top1) > 0
    assert zero_shot.count_top(images, ours, labels, 5) == round(200 * top5) > round(200 * top1)


def outcomes_of_retrieval(
    texts: Texts, images: torch.Tensor, captions: list[tuple[str, ...]], most: int = MOST_IMAGES
) -> dict[str, dict[str, Any]]:
    num = len(images)
    features = Features(
        tokens=images,
        embedding=images,
        projected=images,
        classified=None,
        labels=torch.zeros(num, dtype=torch.long),
        captions=captions,
        index=torch.arange(num),
        dropped={},
    )
    facts = DataFacts(categories=(), vocab_size=256)
    evidence = Evidence(features, features, (), facts, (1,), texts.encode, texts.embed, retrieval_images=most)
    return {name: PROBES[f"retrieval_{name}"].measure(evidence).record for name in ("image", "text")}


def test_retrieval_agrees_with_open_clip() -> None:
    texts, generator = Texts(), torch.Generator().manual_seed(3)
    letters = np.random.default_rng(3).integers(ord("a"), ord("z") + 1, (300, 20), dtype=np.uint8)
    captions = [bytes(row).decode() for row in letters]  # no two of the same letters, which would tie
    of_texts = zero_shot.embed_captions(captions, texts.encode, texts.embed)
    images = F.normalize(of_texts + 0.02 * torch.randn(300, 12, generator=generator), dim=1)
    theirs = get_clip_metrics(images, of_texts, 100.0)
    ours = outcomes_of_retrieval(texts, images, [(caption,) for caption in captions])
    for query, way in (("image", "image_to_text"), ("text", "text_to_image")):
        recall = {top: found["accuracy"] for top, found in ours[query]["recall"].items()}
        assert recall == {str(top): theirs[f"{way}_R@{top}"] for top in retrieval.TOPS}
        assert 0.05 < recall["1"] < recall["10"] < 1
        assert ours[query]["interval"] == list(wilson(round(300 * recall["1"]), 300))  # a caption an image


def test_what_is_no_number_is_no_hit() -> None:
    """Of features, and of captions: a tower of finite weights may overflow."""
    captions = [(f"thing number {i}",) for i in range(20)]
    is_match, nothing = retrieval.matches(captions), torch.full((20, 12), torch.nan)
    assert retrieval.ranks(nothing, torch.ones(20, 12), is_match).tolist() == [19] * 20
    texts = Texts()
    texts.table[ord("7")] = torch.nan
    with pytest.raises(
        NotMeasured, match="the vectors of 2 of 20 texts are not finite: the training has diverged"
    ):
        outcomes_of_retrieval(texts, torch.ones(20, 12), captions)


def test_captions_of_one_image_are_no_independent_queries() -> None:
    texts, generator = Texts(), torch.Generator().manual_seed(4)
    captions = [tuple(f"{i} things of kind {i**2} seen {j} times" for j in range(5)) for i in range(200)]
    of_texts = zero_shot.embed_captions([c[0] for c in captions], texts.encode, texts.embed)
    images = F.normalize(of_texts + 0.015 * torch.randn(200, 12, generator=generator), dim=1)
    found = outcomes_of_retrieval(texts, images, captions)
    assert "interval_of" not in found["image"] and found["image"]["n"] == 200
    row = found["text"]
    assert row["n"] == 1000 and row["interval_of"]["method"] == CLUSTERED
    assert row["interval_of"]["clusters"] == 200 <= row["interval_of"]["effective_n"] < 1000
    low, high = wilson(round(1000 * row["accuracy"]), 1000)
    assert row["interval"][1] - row["interval"][0] > 1.2 * (high - low)


def test_intervals_over_clusters_hold_the_truth_as_often_as_they_say() -> None:
    """1,000 draws of 150 images with 1 to 6 captions, whose chance of being found is the image's own, 0.6 in mean."""
    random = np.random.default_rng(0)
    held, naive = [], []
    for _ in range(1000):
        counts = random.integers(1, 7, 150)
        correct = random.binomial(counts, random.beta(0.6, 0.4, 150))
        low, high = clustered(torch.from_numpy(correct), torch.from_numpy(counts))["interval"]
        held.append(low <= 0.6 <= high)
        low, high = wilson(int(correct.sum()), int(counts.sum()))
        naive.append(low <= 0.6 <= high)
    assert 0.925 < np.mean(held) < 0.975 and np.mean(naive) < 0.85  # four deviations of 1,000 draws: 0.028


def test_intervals_over_clusters_are_those_of_a_bootstrap_over_images() -> None:
    random = np.random.default_rng(1)
    counts = random.integers(1, 7, 400)
    correct = random.binomial(counts, random.beta(0.6, 0.4, 400))
    drawn = random.integers(0, 400, (4000, 400))
    shares = correct[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    found = clustered(torch.from_numpy(correct), torch.from_numpy(counts))["interval"]
    assert np.abs(np.quantile(shares, [0.025, 0.975]) - found).max() < 0.005  # of a width of 0.08
    ones = torch.ones(50, dtype=torch.long)
    for alone in (ones, torch.zeros_like(ones), torch.arange(50) % 2):
        expected = wilson(int(alone.sum()), 50)
        assert clustered(alone, ones)["interval"] == pytest.approx(expected, abs=3e-3)
    # All right: no variance to go by, the images count.
    assert clustered(5 * ones, 5 * ones)["interval"] == pytest.approx(wilson(50, 50))


def test_other_data_keeps_its_names_and_the_plain_templates() -> None:
    for categories in (("red_fish", "arrow"), [f"n0000000{i}" for i in range(1000)], ["n01440764"] * 1000):
        name, templates, names = choose_templates(AUTO, categories)
        assert (name, templates, names) == (PLAIN, PROMPTS, tuple(categories))
    assert len(choose_templates("imagenet_simple", ("ant",))[1]) == 7
    with pytest.raises(ValueError, match=r"--templates 'clip' is unknown; choose from \['auto', 'plain'"):
        choose_templates("clip", ())


@pytest.mark.parametrize(("most", "num_galleries"), [(90, 3), (40, 5), (299, 1), (300, 1), (5000, 1)])
def test_of_more_images_than_compete_recall_is_the_mean_over_galleries(most: int, num_galleries: int) -> None:
    texts, generator = Texts(), torch.Generator().manual_seed(3)
    letters = np.random.default_rng(3).integers(ord("a"), ord("z") + 1, (300, 20), dtype=np.uint8)
    captions = [bytes(row).decode() for row in letters]
    of_texts = zero_shot.embed_captions(captions, texts.encode, texts.embed)
    images = F.normalize(of_texts + 0.03 * torch.randn(300, 12, generator=generator), dim=1)
    found = outcomes_of_retrieval(texts, images, [(caption,) for caption in captions], most)
    size = min(most, 300)
    each = [
        get_clip_metrics(images[start : start + size], of_texts[start : start + size], 100.0)
        for start in range(0, num_galleries * size, size)
    ]
    for query, way in (("image", "image_to_text"), ("text", "text_to_image")):
        row = found[query]
        assert (row["galleries"], row["images"]) == (num_galleries, num_galleries * size)
        for top in retrieval.TOPS:
            mean = sum(one[f"{way}_R@{top}"] for one in each) / num_galleries
            assert row["recall"][str(top)]["accuracy"] == pytest.approx(mean)
            assert row["recall"][str(top)]["chance"] == pytest.approx(top / size)


def test_retrieval_counts_equal_captions_for_each_other() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[1, 0, 2]]  # the first two are exchanged
    for captions, ranks in ((["one", "two", "three"], [1, 1, 0]), (["one", "one", "three"], [0, 0, 0])):
        is_match = retrieval.matches([(caption,) for caption in captions])
        # The wrong one of the first query is better, the third candidate is no better than the right one.
        assert (retrieval.ranks(images, texts, is_match) > 0).int().tolist() == ranks


def test_any_of_several_captions_finds_the_image_and_each_is_a_query() -> None:
    is_match = retrieval.matches([("a", "b", "c"), ("d",), ("e", "a")])
    assert is_match.rows(0, 3).int().tolist() == [[1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 1]]
    assert torch.equal(is_match.turned.rows(0, 6), is_match.rows(0, 3).T)
    assert torch.equal(is_match.turned.rows(4, 6), is_match.rows(0, 3).T[4:])
    assert (is_match.counts().tolist(), is_match.turned.counts().tolist()) == ([4, 1, 3], [2, 1, 1, 1, 1, 2])
    angles = torch.tensor([0.0, 10, 80, 40, 55, 20]).deg2rad()
    texts = torch.stack([angles.cos(), angles.sin()], dim=1)
    at = torch.tensor([5.0, 52, 60]).deg2rad()
    images = torch.stack([at.cos(), at.sin()], dim=1)
    # Image 1, at 52 degrees, has 55 before its own 40; image 2, at 60, has its 55 first.
    assert retrieval.ranks(images, texts, is_match).tolist() == [0, 1, 0]
    # Captions at 0, 10 and 20 find image 0; 80 has both others before it; 40 and 55 find image 1, right for 40 alone.
    assert retrieval.ranks(texts, images, is_match.turned).tolist() == [0, 0, 2, 0, 1, 0]


def test_chance_of_retrieval_is_that_of_random_order() -> None:
    is_match = retrieval.matches([("a", "b"), ("c",), ("d",), ("a",)])
    generator = torch.Generator().manual_seed(0)
    for top in (1, 3):
        hits = [
            (retrieval.ranks(torch.ones(4, 1), torch.rand(5, 1, generator=generator), is_match) < top)
            for _ in range(200)
        ]
        share = torch.stack(hits).float().mean()
        assert abs(share - retrieval.chance(is_match, top)) < 4 * math.sqrt(0.25 / 800)


def test_retrieval_of_many_is_that_of_all_at_once_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    owned = [
        tuple(f"{n % 97}" for n in range(5 * i, 5 * i + 5)) for i in range(60)
    ]  # five captions, some shared
    images, texts = (torch.randn(n, 8, generator=generator) for n in (60, 300))
    found = retrieval.matches(owned)
    right = torch.tensor([[text in own for others in owned for text in others] for own in owned])
    for queries, candidates, matches, truth in (
        (images, texts, found, right),
        (texts, images, found.turned, right.T),
    ):
        similarity = queries @ candidates.T
        best = similarity.masked_fill(~truth, -torch.inf).max(dim=1, keepdim=True).values
        expected = ((similarity >= best) & ~truth).sum(dim=1)
        for at_once in (7, 1024):
            monkeypatch.setattr(retrieval, "QUERIES_AT_ONCE", at_once)
            assert torch.equal(retrieval.ranks(queries, candidates, matches), expected)
            assert torch.equal(matches.counts(), truth.sum(dim=1))

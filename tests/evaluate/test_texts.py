"""Do zero-shot classification and retrieval say what open_clip and hand calculation say?"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from timm.data import ImageNetInfo

from pretrain.evaluate import retrieval, zero_shot
from pretrain.evaluate.templates import AUTO, IMAGENET, PLAIN, PROMPTS, choose_templates


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
def test_imagenet_zero_shot_agrees_with_open_clip(of_open_clip: bool) -> None:
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
    best = (100 * images @ theirs.T).topk(5).indices  # as open_clip's own evaluation
    assert torch.equal(zero_shot.classify(images, ours), best[:, 0])
    assert zero_shot.count_top(images, ours, labels, 5) == (best == labels[:, None]).sum()


def test_other_data_keeps_its_names_and_the_plain_templates() -> None:
    for categories in (("red_fish", "arrow"), [f"n0000000{i}" for i in range(1000)], ["n01440764"] * 1000):
        name, templates, names = choose_templates(AUTO, categories)
        assert (name, templates, names) == (PLAIN, PROMPTS, tuple(categories))
    assert len(choose_templates("imagenet_simple", ("ant",))[1]) == 7
    with pytest.raises(ValueError, match=r"--templates 'clip' is unknown; choose from \['auto', 'plain'"):
        choose_templates("clip", ())


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
        assert abs(share - retrieval.chance(is_match.counts(), 5, top)) < 4 * math.sqrt(0.25 / 800)


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

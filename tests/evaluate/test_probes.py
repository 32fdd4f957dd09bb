"""Do the probes say what well-kept libraries and hand calculation say?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from pretrain.evaluate import knn, linear, zero_shot
from pretrain.evaluate import rows as names_of_rows
from pretrain.evaluate.accuracy import confusion_counts, score, wilson
from pretrain.evaluate.dense import DenseFeatures
from pretrain.evaluate.evidence import Evidence, NotMeasured, outcome_of
from pretrain.evaluate.features import Features
from pretrain.evaluate.probes import PROBES, measure
from pretrain.evaluate.result import table
from pretrain.evaluate.rows import DEFAULT
from pretrain.evaluate.templates import PROMPTS
from pretrain.facts import DataFacts

NUM_CATEGORIES = 6


def clusters(n: int, seed: int, spread: float = 1.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in 16 dimensions around one centre a category, overlapping enough to be mistaken."""
    centres = torch.randn(NUM_CATEGORIES, 16, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CATEGORIES, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, 16, generator=generator), labels


def test_knn_of_every_k_agrees_with_scikit_learn() -> None:
    train, labels = clusters(300, seed=0)
    queries, _ = clusters(200, seed=1)
    ours = knn.votes(train, labels, queries, (20, 1, 7, 40, 200, 301), NUM_CATEGORIES)
    assert list(ours) == [20, 1, 7, 40, 200]  # 301 images there are not
    for k, predicted in ours.items():
        theirs = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distances: np.exp((1 - distances) / knn.TEMPERATURE),
        ).fit(train.numpy(), labels.numpy())
        assert predicted.tolist() == theirs.predict(queries.numpy()).tolist()


def test_knn_votes_are_weighted_by_similarity() -> None:
    # One neighbour at 0.9 outweighs two at 0.8: exp(0.1 / 0.07) = 4.2 > 2; it does not outweigh five.
    labels = torch.tensor([[1, 0, 0, 2, 2, 2]])
    two = knn.vote(torch.tensor([[0.9, 0.8, 0.8, -1.0, -1.0, -1.0]]), labels, 3)
    five = knn.vote(torch.tensor([[0.9, 0.8, 0.8, 0.8, 0.8, 0.8]]), torch.tensor([[1, 0, 0, 0, 0, 0]]), 3)
    assert two.tolist() == [1] and five.tolist() == [0]


def test_knn_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = clusters(100, seed=0)
    queries, _ = clusters(50, seed=1)
    whole = knn.nearest(train, queries, 5)
    monkeypatch.setattr(knn, "CHUNK", 7)
    for rows in (100, 33, 3):  # fewer than are sought, too
        monkeypatch.setattr(knn, "MOST_ROWS", rows)
        assert torch.equal(whole[1], knn.nearest(train, queries, 5)[1])


@pytest.mark.parametrize("k", [0, 101])
def test_k_outside_the_training_set_is_refused(k: int) -> None:
    train, _ = clusters(100, seed=0)
    with pytest.raises(ValueError, match=rf"k={k} must lie in \[1, 100\].*--k"):
        knn.nearest(train, train, k)


def test_linear_probe_agrees_with_scikit_learn_on_standardised_features() -> None:
    train, labels = clusters(300, seed=0)
    heldout, _ = clusters(200, seed=1)
    scaler = StandardScaler().fit(train.double().numpy())
    probe = LogisticRegression(C=linear.C, max_iter=5000).fit(scaler.transform(train.double()), labels)
    theirs = probe.predict(scaler.transform(heldout.double()))
    assert linear.linear_probe(train, labels, heldout).tolist() == theirs.tolist()


@pytest.mark.parametrize("num_categories", [NUM_CATEGORIES, 2])
def test_linear_probe_of_a_large_set_agrees_with_scikit_learn(
    num_categories: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels = clusters(300, seed=0)
    labels = 3 * (labels % num_categories) + 1  # numbers with gaps
    train[:, 0] = 7.0  # a constant
    monkeypatch.setattr(linear, "MOST_VALUES", 300 * 16 - 1)
    monkeypatch.setattr(linear, "ROWS_AT_ONCE", 70)
    scaler = StandardScaler().fit(train.double().numpy())
    theirs = LogisticRegression(C=linear.C, tol=1e-6, max_iter=5000).fit(
        scaler.transform(train.double()), labels
    )
    ours = linear.Large(train, labels, "cpu").fit()
    expected = np.concatenate([theirs.coef_.T, theirs.intercept_[None]])
    centred = ours.weights.numpy()
    if num_categories > 2:  # a bias that all share changes nothing
        centred[-1] -= centred[-1].mean()
        expected[-1] -= expected[-1].mean()
    # Both end where the slope of the mean loss is below 1e-4.
    np.testing.assert_allclose(centred, expected, atol=5e-3)
    heldout, _ = clusters(200, seed=1)
    agreeing = linear.linear_probe(train, labels, heldout) == torch.from_numpy(
        theirs.predict(scaler.transform(heldout.double()))
    )
    assert agreeing.float().mean() >= 0.99 and linear.solver_of(*train.shape) == linear.SOLVERS[1]


@pytest.mark.parametrize("most", [linear.MOST_VALUES, 0], ids=linear.SOLVERS)
def test_linear_probe_without_a_solution_is_not_measured(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = clusters(300, seed=0)
    monkeypatch.setattr(linear, "MOST_VALUES", most)
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 2)
    with pytest.raises(NotMeasured, match=r"did not come to its minimum \(.* 2 iteration"):
        linear.linear_probe(train, labels, train)


def test_linear_probe_does_not_depend_on_the_units_of_a_feature() -> None:
    train, labels = clusters(300, seed=0)
    heldout, _ = clusters(200, seed=1)
    units = torch.logspace(-3, 3, 16)
    ours = linear.linear_probe(train * units, labels, heldout * units)
    assert (ours == linear.linear_probe(train, labels, heldout)).float().mean() > 0.99


def test_linear_probe_of_one_image_a_category_says_nothing_of_regression() -> None:
    """scikit-learn warns of more classes than half of its samples, above 20; warnings are errors here."""
    labels = torch.arange(24)
    features = 10 * torch.eye(24)
    assert linear.linear_probe(features, labels, features).tolist() == labels.tolist()


def test_a_single_category_leaves_the_other_probes_their_rows() -> None:
    labels = torch.zeros(9, dtype=torch.long)
    row = outcome_of(lambda: linear.linear_probe(torch.randn(9, 4), labels, torch.randn(2, 4))).record
    assert row["accuracy"] is None and row["reason"].startswith("the training images show 1 category")


def test_probes_are_at_chance_on_random_features() -> None:
    generator = torch.Generator().manual_seed(0)
    train, heldout = (torch.randn(600, 16, generator=generator) for _ in range(2))
    labels, truth = (torch.randint(NUM_CATEGORIES, (600,), generator=generator) for _ in range(2))
    similarities, indices = knn.nearest(train, heldout, 20)
    for predicted in (
        knn.vote(similarities, labels[indices], NUM_CATEGORIES),
        linear.linear_probe(train, labels, heldout),
        zero_shot.classify(F.normalize(heldout, dim=1), F.normalize(train[:NUM_CATEGORIES], dim=1)),
    ):
        row = score(predicted, truth, NUM_CATEGORIES)
        # Four standard deviations of a proportion of 1/6 in 600.
        assert abs(row["accuracy"] - row["chance"]) < 4 * math.sqrt(1 / 6 * 5 / 6 / 600)


def test_zero_shot_by_hand() -> None:
    # Class 0 has prompts at 0 and 90 degrees, so stands at 45; class 1 has both at 120 degrees.
    def at(degrees: float) -> list[float]:
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]

    classes = zero_shot.ensemble(torch.tensor([[at(0), at(90)], [at(120), at(120)]]))
    torch.testing.assert_close(classes, torch.tensor([at(45), at(120)]))
    # The border lies half-way, at 82.5 degrees.
    images = torch.tensor([at(0), at(82), at(83), at(200)])
    assert zero_shot.classify(images, classes).tolist() == [0, 0, 1, 1]


def test_class_vectors_are_the_mean_of_every_prompt_of_their_class() -> None:
    table = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))

    def encode(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([sum(caption.encode()) % 1000]), torch.tensor([True])

    def embed(tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(table[tokens[:, 0]], dim=1)

    names = ("red_fish", "arrow", "hourglass")
    found = zero_shot.class_vectors(names, encode, embed)
    for row, words in zip(found, ("a red fish", "an arrow", "an hourglass"), strict=True):
        vectors = [embed(encode(p.text.format(words))[0][None], torch.tensor([[True]]))[0] for p in PROMPTS]
        torch.testing.assert_close(row, F.normalize(torch.stack(vectors).mean(0), dim=0))


def test_planted_features_are_found_by_every_probe() -> None:
    names = ("red", "green", "blue")
    captions = [f"a {name} thing" for name in names]
    words = {prompt.fill(name): row for row, name in enumerate(names) for prompt in PROMPTS}
    numbers = words | {caption: row for row, caption in enumerate(captions)}

    def encode(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([numbers[caption]]), torch.tensor([True])

    labels = torch.arange(30) % 3
    vectors = torch.eye(3)[labels]
    dense = DenseFeatures(
        tokens=vectors[:, None].expand(-1, 4, -1),
        places=torch.arange(4).expand(30, 4),
        classes=(1 + labels)[:, None, None].expand(-1, 4, 4).to(torch.int16),
        kinds=tuple(sorted(names)),
        grid=2,
    )
    planted = Features(
        tokens=vectors,
        embedding=vectors,
        projected=vectors,
        classified=2 - labels,  # the run numbers the same names backwards
        labels=labels,
        captions=[(captions[label],) for label in labels],
        index=torch.arange(30),
        dropped={},
        dense=dense,
    )
    evidence = Evidence(
        train=planted,
        heldout=planted,
        categories=names,
        facts=DataFacts(categories=tuple(reversed(names)), vocab_size=9),
        ks=(3, 10),
        encode=encode,
        embed=lambda tokens, token_mask: torch.eye(3)[tokens[:, 0]],
    )
    rows = {name: outcome.record for name, outcome in measure(evidence).items()}
    assert {name: row["accuracy"] for name, row in rows.items()} == dict.fromkeys(DEFAULT, 1.0)
    assert rows["retrieval_image"]["chance"] == pytest.approx(1 / 3)  # a third of the captions are the same
    few = measure(replace(evidence, retrieval_images=9, kept={}), ["retrieval_image"])[
        "retrieval_image"
    ].record
    assert (few["n"], few["images"], few["captioned_images"], few["galleries"]) == (27, 27, 30, 3)
    shown = table({"checkpoints": {"last": {"retrieval_image": few}}})
    assert "the first 27 of 30 images with captions, 9 compete (--retrieval-images)" in shown


def test_every_probe_has_a_row_of_its_title() -> None:
    assert list(PROBES) == list(names_of_rows.PROBES)


def test_interval_is_wilsons() -> None:
    # Newcombe, Statistics in Medicine 1998, table I: 81 of 263 and 15 of 148 and 0 of 20.
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(correct, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_score_tells_chance_from_the_majority() -> None:
    row = score(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 2]), 4)
    assert (row["accuracy"], row["chance"], row["majority"], row["n"]) == (0.75, 0.25, 0.75, 4)


def test_confusion_has_truth_in_rows() -> None:
    counts = confusion_counts(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1]), 3)
    assert counts.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]

"""Do heads that are trained step by step agree with scikit-learn and with themselves alone, and choose fairly?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pretrain.checkpoint import load_towers
from pretrain.evaluate import cached, features, few_shot, heads, linear, probing
from pretrain.evaluate.asked import Protocols
from pretrain.evaluate.cached import CachedTokens, TokenCache
from pretrain.evaluate.dense import Sampling
from pretrain.evaluate.evidence import Evidence
from pretrain.evaluate.features import LAYERS, MASKED, TOKENS, Features, extract
from pretrain.evaluate.probes import PROBES, measure
from pretrain.evaluate.protocols import evaluate_checkpoint
from pretrain.evaluate.shares import Share, judge, share_of
from pretrain.facts import DataFacts
from tests.evaluate.sets import write_set
from tests.evaluate.test_evaluate import damage
from tests.evaluate.test_probes import NUM_CATEGORIES, clusters

SHORT = replace(heads.PAPER, epochs=20, warmup=2)


def evidence(train: Features, heldout: Features) -> Evidence:
    names = tuple(f"kind {i}" for i in range(NUM_CATEGORIES))
    facts = DataFacts(categories=names, vocab_size=0)
    return Evidence(train, heldout, names, facts, ks=(20,), encode=None, embed=lambda *_: torch.empty(0))


def planted(n: int, seed: int, **changes: object) -> Features:
    values, labels = clusters(n, seed)
    found = Features(values, None, None, None, labels, [()] * n, torch.arange(n), {})
    return replace(found, **changes)


def test_linear_probe_of_the_paper_agrees_with_scikit_learn() -> None:
    train, labels = clusters(600, seed=0)
    heldout, truth = clusters(400, seed=1)
    head = heads.train_heads({"x": train}, labels, NUM_CATEGORIES, [heads.PAPER.lr])[0]
    ours = head.predict({"x": heldout})
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(C=1.0, max_iter=5000).fit(scaler.transform(train), labels)
    said = torch.from_numpy(theirs.predict(scaler.transform(heldout)))
    # LARS stops before the optimum and has no penalty: what lies near a border may fall to the other side.
    assert (ours == said).float().mean() > 0.95
    assert abs((ours == truth).float().mean() - (said == truth).float().mean()) < 0.02
    assert (said == truth).float().mean() < 0.95  # the borders matter


def test_heads_trained_together_are_those_trained_alone() -> None:
    train, labels = clusters(200, seed=0)
    values = {"x": train, "y": train[:, :5] ** 2}
    together = heads.train_heads(values, labels, NUM_CATEGORIES, [0.5, 3.2], SHORT)
    assert [(head.feature, head.lr) for head in together] == [("x", 0.5), ("x", 3.2), ("y", 0.5), ("y", 3.2)]
    alone = heads.train_heads({"x": train}, labels, NUM_CATEGORIES, [3.2], SHORT)[0]
    torch.testing.assert_close(together[1].weight, alone.weight)
    assert not torch.allclose(together[0].weight, alone.weight, atol=1e-3)


def test_first_step_of_lars_is_a_share_of_the_weights() -> None:
    # Trust ratio: the first step is lr x 0.001 x the norm of the weights, whatever the gradient's.
    train, labels = clusters(64, seed=0)
    once = replace(SHORT, epochs=1, warmup=0, batches=1)
    still, moved = heads.train_heads({"x": train}, labels, NUM_CATEGORIES, [1e-9, 3.2], once)
    step = (moved.weight - still.weight).norm()
    torch.testing.assert_close(step, 3.2e-3 * still.weight.norm(), rtol=1e-3, atol=0)


def test_split_chooses_by_training_images_of_every_category() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    fit, chosen = heads.selection_split(labels)
    assert sorted([*fit.tolist(), *chosen.tolist()]) == list(range(18))
    assert labels[chosen].bincount(minlength=4).tolist() == [2, 1, 1, 0]
    assert not torch.equal(chosen, heads.selection_split(labels, seed=1)[1])


def test_sweep_finds_the_layer_and_ignores_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PAPER", SHORT)
    monkeypatch.setattr(probing, "RATES", (0.8, 3.2))
    train, heldout = planted(300, 0), planted(200, 1)
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(3))
    train = replace(train, tokens=noise, layers={"layer 3": train.tokens})
    other = replace(heldout, tokens=noise[:200], layers={"layer 3": heldout.tokens})
    worse = replace(other, layers={"layer 3": noise[:200].repeat(1, 2)})
    found, misled = (probing.linear_sweep(evidence(train, split)).record for split in (other, worse))
    assert found["feature"] == misled["feature"] == "layer 3" and found["lr"] == misled["lr"]
    assert found["accuracy"] > 0.45 > 0.3 > misled["accuracy"]  # chance is 1/6
    assert len(found["tried"]) == 4


def test_attentive_probe_finds_what_the_mean_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    # One token of eight, marked by its first channel, tells the category by a sign; the mean of all is noise.
    def tokens(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = 2 * torch.randn(n, 8, 32, generator=generator)
        values[..., 0] = 0
        labels = torch.arange(n) % 2
        places = torch.randint(8, (n,), generator=generator)
        values[torch.arange(n), places, 0] = 12.0
        values[torch.arange(n), places, 1] = 3.0 * (2 * labels - 1)
        return values, labels

    monkeypatch.setattr(probing, "ATTENTIVE", replace(probing.ATTENTIVE, epochs=12, rates=(1e-6, 3e-3)))
    splits = []
    for n, seed in ((512, 0), (200, 1)):
        values, labels = tokens(n, seed)
        kept = CachedTokens(values.half(), torch.arange(n))
        splits.append(planted(n, seed, tokens=values.mean(1), labels=labels, cached=kept))
    attentive, mean = (
        probing.attentive_probe(evidence(*splits)),
        PROBES["linear"].measure(evidence(*splits)),
    )
    assert (
        attentive.record["accuracy"] > 0.9 and attentive.record["accuracy"] > mean.record["accuracy"] + 0.15
    )


def test_cached_tokens_are_bounded_and_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "MOST_BYTES", 5 * 2 * 12)
    cache = TokenCache(20, 12)
    for start in (0, 10):
        cache.add(torch.ones(10, 4, 3) * start, list(range(start, start + 10)))
    assert cache.collected().index.tolist() == [0, 4, 8, 12, 16]
    assert cache.collected().tokens.dtype == torch.float16


def test_draws_are_balanced_seeded_and_their_mean_has_students_interval() -> None:
    labels = torch.arange(400) % 4
    rows = few_shot.draw(labels, 10, seed=0)
    assert labels[rows].bincount().tolist() == [10] * 4
    assert torch.equal(rows, few_shot.draw(labels, 10, 0)) and not torch.equal(
        rows, few_shot.draw(labels, 10, 1)
    )
    assert len(few_shot.draw(labels[:8], 1, 0)) == 4  # one a category at least
    truth = torch.zeros(10, dtype=torch.long)

    def predict(rows: torch.Tensor, seed: int) -> torch.Tensor:
        return (torch.arange(10) < seed).long()  # wrong `seed` times

    row = few_shot.over_draws(labels, 1, truth, predict, 4, seeds=(0, 1, 2))
    assert row["accuracy"] == pytest.approx(0.9) and row["train_images"] == 4
    low, high = stats.t.interval(0.95, 2, loc=0.9, scale=0.1 / 3**0.5)
    assert row["interval"] == pytest.approx([low, min(high, 1.0)])


def test_few_labels_tell_less_than_many() -> None:
    splits = planted(1200, 0), planted(300, 1)
    few, more = (probing.few_shot_knn(evidence(*splits), share).record["accuracy"] for share in (1, 10))
    assert few < more < PROBES["knn"].measure(evidence(*splits)).record["accuracy"] + 0.02


@pytest.mark.parametrize("step", ["step_000003"])
def test_layers_and_tokens_are_those_of_the_encoder(run_folder: Path, data: Path, step: str) -> None:
    run, _, towers = load_towers(run_folder / "checkpoints" / step)
    found = extract(
        towers,
        run,
        data / "heldout",
        device=torch.device("cpu"),
        workers=0,
        title="test",
        kept=frozenset({LAYERS, TOKENS}),
    )
    assert [values.shape for values in found.layers.values()] == [(20, 16 * 2**i) for i in range(4)]
    torch.testing.assert_close(found.cached.tokens.float().mean(1), found.tokens, rtol=1e-2, atol=1e-2)
    assert torch.equal(found.cached.index, found.index) and found.dense is None


def test_shares_of_a_data_set_join_to_the_whole(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, towers = load_towers(run_folder / "checkpoints" / "step_000003")

    def of_rank(number: int, world: int) -> Features:
        monkeypatch.setattr(features, "rank", lambda: number)
        monkeypatch.setattr(features, "world_size", lambda: world)
        kept, few = frozenset({MASKED, LAYERS, TOKENS}), Sampling(20, 3)
        options = {"device": torch.device("cpu"), "workers": 0, "title": "test", "dense": few, "kept": kept}
        return extract(towers, run, data / "heldout", **options)

    whole, parts = of_rank(0, 1), [of_rank(number, 3) for number in range(3)]
    assert [told for part in parts for told in part.captions] == whole.captions
    assert {part.dense.kinds for part in parts} == {whole.dense.kinds}
    assert [len(part.tokens) for part in parts] == [6, 7, 7]

    def same(value: Callable[[Features], torch.Tensor]) -> None:
        ours = torch.cat([value(part) for part in parts])
        # Batches of other sizes sum in another order; some are kept in half precision.
        torch.testing.assert_close(ours, value(whole), rtol=1e-2, atol=1e-2)

    for name in ("index", "labels", "tokens", "projected"):
        same(attrgetter(name))
    for name in ("dense.tokens", "dense.places", "dense.classes", "cached.tokens", "cached.index"):
        same(attrgetter(name))
    for name in whole.layers:
        same(lambda found, name=name: found.layers[name])


def test_ranks_without_a_readable_image_end_nothing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 images 8 ranks get none or one, and the one that is damaged is judged among all."""
    run, _, towers = load_towers(run_folder / "checkpoints" / "step_000003")
    folder = write_set(tmp_path / "set", "heldout", 1)
    damage(folder, sample=1)
    monkeypatch.setattr(features, "world_size", lambda: 8)

    def of_rank(number: int) -> Share:
        monkeypatch.setattr(features, "rank", lambda: number)
        options = {"device": torch.device("cpu"), "workers": 0, "title": "test"}
        return share_of(lambda: extract(towers, replace(run, max_bad=0.5), folder, **options))

    shares = [of_rank(number) for number in range(8)]
    assert [share.counts[2] for share in shares] == [0, 1, 0, 0, 0, 1, 0, 1]
    counts = [share.counts for share in shares]
    assert judge(counts, 0.5, folder).total() == 1
    assert [s.features.index.tolist() for s in shares if s.features is not None] == [[0], [2], [3]]
    with pytest.raises(ValueError, match=r"1 of the 4 samples read so far are bad.*max_bad=0\.001 allows 0"):
        judge(counts, 0.001, folder)
    with pytest.raises(ValueError, match="has no readable image"):
        judge([share.counts for share in shares if not share.counts[2]], 1.0, folder)


def test_every_slow_probe_is_measured_on_a_run(
    run_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "PAPER", replace(SHORT, epochs=5))
    monkeypatch.setattr(probing, "ATTENTIVE", replace(probing.ATTENTIVE, epochs=2, rates=(1e-3,)))
    step = run_folder / "checkpoints" / "step_000003"
    names = ("linear_lars", "linear_sweep", "attentive", "few_shot_1_knn", "few_shot_10_linear")
    rows = evaluate_checkpoint(step, data / "train", data / "heldout", Protocols(probes=names))
    for name in names:
        low, high = rows[name]["interval"]
        assert 0 <= low <= rows[name]["accuracy"] <= high <= 1, name
    assert rows["few_shot_10_linear"]["solver"] == linear.SOLVERS[0]
    assert {tried["feature"] for tried in rows["linear_sweep"]["tried"]} >= {
        "tokens",
        "layer 4",
        "all layers",
    }


def test_images_without_categories_are_not_measured() -> None:
    split = planted(30, 0, labels=torch.full((30,), -1))
    names = tuple(
        name for name in PROBES if name.startswith(("linear_lars", "linear_sweep", "attentive", "few_shot"))
    )
    for outcome in measure(evidence(split, split), names).values():
        assert outcome.record == {"accuracy": None, "reason": "the data set has no categories"}

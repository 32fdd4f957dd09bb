"""Do several ranks, each with its share of the features, measure what one rank with all of them does?

As a script, one rank of it: `python test_joint_probes.py FOLDER [RUN DATA]`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.collectives import all_rows, from_every_rank, rank, world_size
from pretrain.evaluate import attentive, heads, linear, probing, result
from pretrain.evaluate.cached import CachedTokens
from pretrain.evaluate.dense import DenseFeatures
from pretrain.evaluate.evaluation import evaluate
from pretrain.evaluate.evidence import Evidence
from pretrain.evaluate.features import Features, NoneReadable
from pretrain.evaluate.probes import PROBES, measure
from pretrain.evaluate.shares import divided
from pretrain.facts import DataFacts
from tests.engine.launch import start

CPU = torch.device("cpu")
NAMES = tuple(f"kind {i}" for i in range(4))
NUM_TRAIN, NUM_HELDOUT = 101, 53
# Numbers of the images between which the ranks' shares lie: uneven, and some ranks have none.
SHARES = {
    1: ((0, NUM_TRAIN), (0, NUM_HELDOUT)),
    2: ((0, 37, NUM_TRAIN), (0, NUM_HELDOUT, NUM_HELDOUT)),
    3: ((0, 70, 70, NUM_TRAIN), (0, 0, 20, NUM_HELDOUT)),
}
LARGE = "linear, large set"
FEW = ("knn", "linear", "linear_sweep", "attentive", "few_shot_10_linear", "dense")
LEFT, LOST = 7, 9  # exit codes


def planted(count: int, seed: int) -> Features:
    """All that probes read, around a centre a category; some images have no category, some no caption or mask."""
    centres = torch.randn(len(NAMES), 4, 32, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    tokens = centres[labels] + 2 * torch.randn(count, 4, 32, generator=generator)
    is_masked, is_cached = torch.arange(count) % 3 == 0, torch.arange(count) % 2 == 0
    classes = (1 + labels % 3)[:, None, None].repeat(1, 4, 4).to(torch.int16)
    classes[:, :2] = 0
    return Features(
        tokens=tokens.mean(1),
        embedding=tokens[:, 0],
        projected=F.normalize(tokens[:, 3], dim=1),
        classified=torch.randint(len(NAMES), (count,), generator=generator),
        labels=labels.where(torch.arange(count) % 11 > 0, -1),
        captions=[(NAMES[label], f"a {NAMES[label]}")[: i % 3] for i, label in enumerate(labels.tolist())],
        index=torch.arange(count),
        dropped={"unreadable": 1},
        dense=DenseFeatures(
            tokens[is_masked],
            torch.arange(4).repeat(int(is_masked.sum()), 1),
            classes[is_masked],
            ("ant", "bee", "cow"),
            2,
        ),
        layers={"layer 3": tokens[:, 1], "layer 4": tokens[:, 2]},
        cached=CachedTokens(tokens[is_cached].half(), torch.arange(count)[is_cached]),
    )


def between(found: Features, start: int, stop: int) -> Features:
    """What a rank reads of the images from `start` to `stop`."""
    if start == stop:
        raise NoneReadable("none", Counter(unreadable=1))
    assert found.dense is not None and found.cached is not None
    masked, kept = (found.index % 3 == 0).nonzero()[:, 0], found.cached.index
    is_masked, is_kept = (masked >= start) & (masked < stop), (kept >= start) & (kept < stop)
    rows = slice(start, stop)
    return Features(
        tokens=found.tokens[rows],
        embedding=found.embedding[rows],
        projected=found.projected[rows],
        classified=found.classified[rows],
        labels=found.labels[rows],
        captions=found.captions[rows],
        index=found.index[rows],
        dropped={"unreadable": 1},
        dense=replace(
            found.dense,
            tokens=found.dense.tokens[is_masked],
            places=found.dense.places[is_masked],
            classes=found.dense.classes[is_masked],
        ),
        layers={name: values[rows] for name, values in found.layers.items()},
        cached=CachedTokens(found.cached.tokens[is_kept], kept[is_kept]),
    )


def own_evidence() -> Evidence:
    """This rank's part."""
    parts = []
    for count, seed, bounds in zip((NUM_TRAIN, NUM_HELDOUT), (0, 1), SHARES[world_size()], strict=True):
        work = partial(between, planted(count, seed), *bounds[rank() : rank() + 2])
        parts.append(divided(work, 0.5, Path("planted")))
    table = F.normalize(torch.randn(1000, 32, generator=torch.Generator().manual_seed(7)), dim=1)

    def encode(caption: str) -> tuple[Tensor, Tensor]:
        return torch.tensor([sum(caption.encode()) % 1000]), torch.tensor([True])

    facts = DataFacts(categories=NAMES[::-1], vocab_size=1000)
    embed = lambda tokens, mask: table[tokens[:, 0]]  # noqa: E731
    return Evidence(*parts, NAMES, facts, ks=(5, 3, 99), encode=encode, embed=embed, retrieval_images=20)


@contextmanager
def short() -> Iterator[None]:
    """Few epochs and rates; the probe's batches are no multiple of anything."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(heads, "PAPER", replace(heads.PAPER, epochs=6, warmup=1, batches=2))
        patched.setattr(probing, "RATES", (0.8, 12.8))
        patched.setattr(
            probing, "ATTENTIVE", replace(probing.ATTENTIVE, epochs=3, rates=(3e-4, 3e-3), batches=2)
        )
        yield


def require_finite_features(evidence: Evidence) -> None:
    """One image's vector that overflowed leaves no probe a number, on every rank the same reason."""
    projected = evidence.train.projected.clone()
    projected[evidence.train.index == 40] = torch.inf
    broken = replace(evidence, train=replace(evidence.train, projected=projected), kept={})
    for name, outcome in measure(broken, tuple(PROBES)).items():
        assert outcome.record["accuracy"] is None and outcome.predicted is None, name
        assert outcome.record["reason"].startswith(
            "the features of 1 of 101 training images are not finite"
        ), name
    assert result.neighbours("step", broken)["queries"] == []


def measured(names: tuple[str, ...] = tuple(PROBES)) -> dict[str, Any]:
    """What probes say of the planted features, and what is trained for them; the same on every rank."""
    evidence = own_evidence()
    with short(), pytest.MonkeyPatch.context() as patched:
        outcomes = measure(evidence, names)
        patched.setattr(linear, "MOST_VALUES", 0)
        outcomes[LARGE] = measure(evidence, ["linear"])["linear"]
        train, held, device = evidence.train, evidence.heldout, CPU
        learnt = heads.train_heads(
            {"tokens": train.tokens}, train.labels.clamp(min=0), len(NAMES), [3.2, 51.2], heads.PAPER
        )
        recipe = probing.ATTENTIVE
        labels = train.labels.clamp(min=0)[torch.isin(train.index, train.cached.index)]
        probe = attentive.train_attentive(train.cached.tokens, labels, len(NAMES), [1e-3], recipe, device)[0]
        with torch.no_grad():
            logits = all_rows(probe(held.cached.tokens.float()))
    told = {
        "rows": {name: outcome.record for name, outcome in outcomes.items()},
        "predicted": {n: o.predicted.tolist() for n, o in outcomes.items() if o.predicted is not None},
        "confusion": result.confusion("step", evidence, outcomes),
        "neighbours": result.neighbours("step", evidence),
        "dropped": evidence.train.dropped,
    }
    assert len(set(from_every_rank([json.dumps(told)]))) == 1
    require_finite_features(evidence)
    return told | {"heads": torch.stack([head.weight for head in learnt]), "logits": logits}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return measured()


def command(run: Path, data: Path, out: Path) -> dict[str, Any]:
    """The result of the command, of probes that read each kind of features."""
    with short():
        probes = "linear,linear_lars,attentive,dense,zero_shot,retrieval_text"
        evaluate([str(run), "--data", str(data), "--steps", "last", "--probes", probes, "--out", str(out)])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def two(
    run_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int], str]:
    """What two ranks leave, with which codes they end, and what they say."""
    folder = tmp_path_factory.mktemp("two")
    places = (str(run_folder), str(data))
    return folder, *start(folder, *places, world=2, script=Path(__file__), timeout=120)


def test_two_ranks_measure_what_one_does(two: tuple[Path, list[int], str], alone: dict[str, Any]) -> None:
    folder, _, output = two
    assert (folder / "found.pt").exists(), output
    require_alike(torch.load(folder / "found.pt"), alone)


def test_three_ranks_measure_what_one_does(tmp_path: Path, alone: dict[str, Any]) -> None:
    codes, output = start(tmp_path, world=3, script=Path(__file__), timeout=120)
    assert codes == [0, 0, 0], output
    require_alike(torch.load(tmp_path / "found.pt"), alone)


def require_alike(found: dict[str, Any], alone: dict[str, Any]) -> None:
    # Sums of float32 in another order; what LARS and AdamW make of it in some 20 steps.
    torch.testing.assert_close(found["heads"], alone["heads"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["logits"], alone["logits"], rtol=1e-3, atol=1e-4)
    assert found["dropped"]["unreadable"] > alone["dropped"]["unreadable"]  # each rank's own, or share
    for name, row in found["rows"].items():
        assert row["accuracy"] is not None, (name, row)
        assert_same(row, alone["rows"][name])
    assert found["predicted"] == {name: alone["predicted"][name] for name in found["predicted"]}
    assert found["confusion"] == alone["confusion"]
    assert_same(found["neighbours"], alone["neighbours"])


def test_two_ranks_write_one_result_of_one_form(
    two: tuple[Path, list[int], str], run_folder: Path, data: Path, tmp_path: Path
) -> None:
    folder, _, output = two
    assert [path.name for path in folder.glob("evaluation*")] == ["evaluation.json"], output
    ours = json.loads((folder / "evaluation.json").read_text())
    expected = command(run_folder, data, tmp_path / "evaluation.json")
    assert_same(kinds_of(ours), kinds_of(expected))
    for rows in zip(*(r["checkpoints"]["step_000003"].items() for r in (ours, expected)), strict=True):
        (name, our), (_, their) = rows
        if name != "dropped":  # 20 images, some of which rounding may take over a border
            assert our["accuracy"] == pytest.approx(their["accuracy"], abs=0.1), name


def test_an_error_of_one_rank_ends_the_other(two: tuple[Path, list[int], str]) -> None:
    _, codes, output = two
    assert codes == [LEFT, LOST], output


def assert_same(found: Any, expected: Any) -> None:
    """Numbers but for the rounding of sums, all else exactly."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)) and not isinstance(expected, str):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-4)
    else:
        assert found == expected


def kinds_of(value: Any) -> Any:
    """A result with the kinds of its numbers in place of these."""
    if isinstance(value, dict):
        return {key: kinds_of(one) for key, one in value.items() if key != "date"}
    if isinstance(value, list):
        return [kinds_of(one) for one in value]
    return type(value).__name__


def fail() -> None:
    """Rank 1 cannot read its images, which all hear, and is lost in the midst of a training, which ends all."""
    heard = ""
    try:
        divided(partial(_failing, "the disk of rank 1 is gone"), 0.5, Path("planted"))
    except (OSError, ValueError) as error:
        heard = str(error)
    assert heard == "the disk of rank 1 is gone"
    with pytest.MonkeyPatch.context() as patched:
        if rank() == 1:
            schedule = heads.warm_cosine
            patched.setattr(
                heads, "warm_cosine", lambda step, *o: sys.exit(LOST) if step == 2 else schedule(step, *o)
            )
        try:
            measure(own_evidence(), ["linear_lars"])
        except RuntimeError:
            sys.exit(LEFT)


def _failing(told: str) -> Features:
    if rank() == 1:
        raise OSError(told)
    return planted(3, 0)


def scenario(folder: Path, *places: str) -> None:
    """What one of several ranks does."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = measured(FEW if places else tuple(PROBES))
    if rank() == 0:
        torch.save(found, folder / "found.pt")
    if places:
        run, data = map(Path, places)
        command(run, data, folder / "evaluation.json")
        fail()
    dist.destroy_process_group()


if __name__ == "__main__":
    scenario(Path(sys.argv[1]), *sys.argv[2:])

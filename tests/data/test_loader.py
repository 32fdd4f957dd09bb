"""Does a rank get the batch that seed and position decide, whatever the machine looks like?"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from data_prep.schema import fill_prompt
from pretrain.config import Mixing, Run, Source, Views
from pretrain.data.batch import NO_CATEGORY, Batch
from pretrain.data.drops import file_of
from pretrain.data.faults import DataError, check_bad_share
from pretrain.data.loader import Loader
from pretrain.data.text import Captions
from pretrain.objective import Input, Objective, Target
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import CATEGORIES, encoded, good_set, sample, small_run, write_set, write_tokenizer
from tests.paths import ROOT


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    write_tokenizer(good_set(root / "talk", (8, 4), has_category=False) / "tokenizer")
    return {"names": good_set(root / "names", has_text=False), "talk": root / "talk"}


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(folders: dict[str, Path], world: int) -> None:
    alone = batches(small_run(), folders, 3)
    ranks = [batches(small_run(), folders, 3, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        assert_same(alone[step], joined([rank[step] for rank in ranks]))


def test_workers_deliver_the_same_batches(folders: dict[str, Path]) -> None:
    for here, there in zip(
        batches(small_run(), folders, 5), batches(small_run(), folders, 5, workers=2), strict=True
    ):
        assert_same(here, there)


def test_resume_equals_straight(folders: dict[str, Path]) -> None:
    straight = batches(small_run(), folders, 6)
    for one, other in zip(straight[4:], batches(small_run(), folders, 2, start_step=4), strict=True):
        assert_same(one, other)


QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking would start processes for an hour
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
@settings(
    max_examples=12, deadline=None, phases=QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(SIZES, SIZES),
    worlds=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    workers=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    weights=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    mixing=st.builds(
        Mixing,
        by=st.sampled_from(["weight", "size"]),
        temperature=st.sampled_from([1.0, 3.0]),
        pairs=st.sampled_from(["any", "same"]),
        window=st.integers(1, 3),
    ),
    stop=st.integers(0, 3),
)
def test_another_number_of_ranks_and_workers_goes_on_with_the_same_sequence(
    tmp_path_factory: pytest.TempPathFactory,
    folders: dict[str, Path],
    sizes: tuple[list[int], list[int]],
    worlds: tuple[int, int],
    workers: tuple[int, int],
    weights: tuple[float, float],
    mixing: Mixing,
    stop: int,
) -> None:
    """Pixels, boxes, masks and tokens bit for bit, of any data, at any step and however sources are mixed."""
    root = tmp_path_factory.mktemp("drawn")
    drawn = {
        "names": good_set(root / "names", sizes[0], has_text=False),
        "talk": good_set(root / "talk", sizes[1], has_category=False),
    }
    tokenizer = folders["talk"] / "tokenizer"
    data = {"names": Source("category", weights[0]), "talk": Source("text", weights[1])}
    run = small_run(batch=2 * worlds[0] * worlds[1], mixing=mixing, data=data)
    straight = batches(run, drawn, 4, tokenizer=tokenizer)
    for world, some, steps in zip(worlds, workers, (range(stop), range(stop, 4)), strict=True):
        ranks = [
            # processes for the last rank alone, to make few of them
            batches(
                run,
                drawn,
                len(steps),
                tokenizer=tokenizer,
                rank=rank,
                world=world,
                start_step=steps.start,
                workers=some if rank == world - 1 else 0,
            )
            for rank in range(world)
        ]
        for step in steps:
            assert_same(straight[step], joined([rank[step - steps.start] for rank in ranks]))


@pytest.mark.parametrize("pairs", ["same", "other"])
def test_the_images_of_an_input_come_from_the_sources_asked_for(folders: dict[str, Path], pairs: str) -> None:
    data = {"names": Source("category"), "talk": Source("text")}
    batch = joined(batches(small_run(data=data, mixing=Mixing(pairs=pairs)), folders, 4))
    first, second = batch.has_category[0::2], batch.has_category[1::2]
    assert bool(((first == second) if pairs == "same" else (first != second)).all())
    assert first.any() and not first.all()


def test_another_seed_gives_other_batches(folders: dict[str, Path]) -> None:
    one, other = (batches(small_run(seed=seed), folders, 1)[0] for seed in (0, 1))
    assert not torch.equal(one.views, other.views) and not torch.equal(one.mask, other.mask)


def test_a_sample_has_the_label_that_its_source_gives(folders: dict[str, Path]) -> None:
    batch = joined(batches(small_run(), folders, 6))
    assert batch.position.tolist() == list(range(48))
    assert torch.equal(batch.has_text, ~batch.has_category)  # either, never both: the sources give one each
    assert 30 <= int(batch.has_category.sum()) <= 34  # weight 2 of 3
    assert set(batch.category.tolist()) == {NO_CATEGORY, 0, 1, 2}
    assert int(batch.tokens[~batch.has_text].sum()) == 0  # padding
    lengths = batch.token_mask.sum(1)[batch.has_text]
    assert (
        int(lengths.min()) >= 5 and int(lengths.max()) == 10
    )  # 3 words and 2 special tokens; longer are cut
    assert torch.equal(batch.token_mask, batch.tokens != 0)


def test_supervision_decides_which_labels_are_taken(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "both")  # samples have category and caption
    write_tokenizer(folder / "tokenizer")
    for supervision, has_category, has_text in (
        ("category", True, False),
        ("text", False, True),
        ("none", False, False),
    ):
        run = small_run(data={"both": Source(supervision)})
        loader = Loader(run, {"both": folder}, None, rank=0, world=1)
        batch = next(loader)
        assert (
            bool(batch.has_category.all()) is has_category and bool(batch.has_category.any()) is has_category
        )
        assert bool(batch.has_text.all()) is has_text and bool(batch.has_text.any()) is has_text
        assert loader.facts.categories == (("ant", "bee", "cow") if has_category else ())
        assert loader.facts.vocab_size == (15 if has_text else 0)
        loader.close()


def test_captions_longer_than_the_text_are_counted(folders: dict[str, Path]) -> None:
    run = small_run(data={"talk": Source("text")}, batch=12)
    loader = Loader(run, {"talk": folders["talk"]}, None, rank=0, world=1, workers=1)
    whole = replace(run, text=replace(run.text, length=40))
    long = Loader(whole, {"talk": folders["talk"]}, None, rank=0, world=1)
    for _ in range(4):
        batch, uncut = next(loader), next(long)
    assert loader.num_captions == long.num_captions == 48 and long.num_cut == 0
    assert 0 < loader.num_cut < 48
    assert bool((uncut.token_mask.sum(1) > 10).any()) and int(batch.token_mask.sum(1).max()) == 10
    loader.close()
    long.close()


def test_categories_become_captions_by_prompts(tmp_path: Path, folders: dict[str, Path]) -> None:
    prompts = ("a red {}", "the sun sees {}")
    run = small_run(data={"names": Source("text", prompts=prompts)}, batch=20)
    names, tokenizer = {"names": folders["names"]}, folders["talk"] / "tokenizer"
    batch = joined(batches(run, names, 4, tokenizer=tokenizer))
    captions = Captions(tokenizer, run.text.length)
    told = {tuple(captions.encode(fill_prompt(p, c)).numbers.tolist()) for p in prompts for c in CATEGORIES}
    assert {tuple(row) for row in batch.tokens.tolist()} == told
    by_category = joined(batches(small_run(data={"names": Source("category")}, batch=20), names, 4)).category
    for row, category in zip(batch.tokens, by_category, strict=True):
        said = [captions.encode(fill_prompt(prompt, CATEGORIES[category])).numbers for prompt in prompts]
        assert any(torch.equal(row, one) for one in said)


def test_prompts_that_cannot_be_used_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"prompts=\['a {}'\] of a source with supervision='category' would be"
    ):
        Source("category", prompts=("a {}",))
    with pytest.raises(ValueError, match=r"prompts \['a photo'\] must hold {}"):
        Source("text", prompts=("a photo", "a {}"))
    run = small_run(data={"talk": Source("text", prompts=("a {}",))})
    with pytest.raises(ValueError, match=r"has no categories, data.talk.supervision='text' needs a .cls"):
        Loader(run, {"talk": folders["talk"]}, None, rank=0, world=1)


def test_a_shard_that_rots_during_training_is_told_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good_set(tmp_path / "names", has_text=False)
    content = bytearray((folder / "000001.tar").read_bytes())
    content[1500] ^= 1  # in a file of JSON or an image: what it does there does not matter here
    (folder / "000001.tar").write_bytes(content)
    monkeypatch.setattr("pretrain.data.loader.VERIFIED_BYTES", 0)
    run = small_run(data={"names": Source("category")}, max_bad=0.5)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(run, {"names": folder}, None, rank=0, world=1, dropped_to=log)
    with pytest.warns(UserWarning, match=r"000001.tar has sha256 .*\(its samples are used as they are\)"):
        while "names: changed_shard" not in loader.dropped:
            next(loader)
    assert '"shard": "000001.tar", "index": -1, "reason": "changed_shard"' in log.read_text()
    loader.close()


def test_an_epoch_chooses_among_the_captions_of_a_sample(folders: dict[str, Path]) -> None:
    run = small_run(data={"talk": Source("text")}, batch=12)  # one epoch a step
    epochs = batches(run, {"talk": folders["talk"]}, 8)
    rows = {tuple(row) for batch in epochs for row in batch.tokens.tolist()}
    assert len(rows) > 24  # of 12 samples with 3 captions each; the .txt alone would give 12


def test_equal_category_names_of_two_sources_are_one_category(tmp_path: Path) -> None:
    first = write_set(tmp_path / "first", [[sample(n) for n in range(4)]], ("ant", "bee", "cow"))
    second = write_set(tmp_path / "second", [[sample(n) for n in range(4)]], ("cow", "dog", "ant"))
    run = small_run(data={"first": Source("category"), "second": Source("category")}, batch=16)
    loader = Loader(run, {"first": first, "second": second}, None, rank=0, world=1)
    assert loader.facts.categories == ("ant", "bee", "cow", "dog")
    # numbers 0, 1, 2, 0 of each: ant bee cow ant, and cow dog ant cow
    assert sorted(next(loader).category.tolist()) == sorted(2 * [0, 1, 2, 0, 2, 3, 0, 2])
    loader.close()


def test_the_other_view_is_made_only_where_a_target_needs_it(folders: dict[str, Path]) -> None:
    batch = batches(small_run(), folders, 1)[0]  # M3I: of the second image of a pair
    assert not batch.views[0::2, 1].any() and not batch.boxes[0::2, 1].any()
    assert batch.views[1::2, 1].flatten(1).any(1).all() and (batch.boxes[1::2, 1, 2:4] > 0).all()
    assert (batch.boxes[:, 0, 2:4] > 0).all()


def test_boxes_lie_in_the_image(folders: dict[str, Path]) -> None:
    batch = joined(batches(small_run(), folders, 4))
    top, left, height, width, flipped = batch.boxes[:, 0].unbind(1)
    assert batch.sizes.unique(dim=0).tolist() == [[40, 52]]
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 40).all() and (left + width <= 52).all()
    assert 0 < float(flipped.mean()) < 1


def test_masks_hide_half_and_differ_between_pairs(folders: dict[str, Path]) -> None:
    mask = joined(batches(small_run(), folders, 4)).mask
    assert mask.shape == (16, 4, 4)
    assert mask.flatten(1).sum(1).tolist() == [8] * 16
    assert len({tuple(row) for row in mask.flatten(1).tolist()}) > 8


def test_an_input_of_one_image_has_an_empty_mask(folders: dict[str, Path]) -> None:
    objective = Objective(Input(mixed=1), {"category": Target("category", "boltzmann")})
    run = small_run(objective=objective, data={"names": Source("category")}, batch=3)
    batch = batches(run, {"names": folders["names"]}, 1)[0]
    assert batch.mask.shape == (3, 4, 4) and not batch.mask.any() and not batch.views[:, 1].any()


def spoilt(tmp_path: Path, bad: dict[int, dict[str, bytes]], size: int = 200) -> Path:
    samples = [sample(n, has_text=False) for n in range(size)]
    for index, members in bad.items():
        samples[index] = members
    return write_set(tmp_path / "spoilt", [samples[: size // 2], samples[size // 2 :]])


def rounds(run: Run, folder: Path, workers: int = 0) -> Iterator[tuple[Batch, dict[str, int]]]:
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1, workers=workers)
    for batch in loader:
        yield batch, dict(loader.dropped)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_replaced_and_counted_by_reason(tmp_path: Path, workers: int) -> None:
    good = sample(3, has_text=False)
    bad = {
        5: {**good, "jpg": good["jpg"][:-20]},
        60: {**good, "jpg": b"no image at all"},
        150: {**good, "cls": b"77"},
    }
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=0.05)
    log = tmp_path / "dropped.jsonl"
    loader = Loader(
        run, {"spoilt": spoilt(tmp_path, bad)}, None, rank=0, world=1, workers=workers, dropped_to=log
    )
    for batch in islice(loader, 10):  # one epoch
        assert batch.has_category.all() and batch.views[:, 0].flatten(1).any(1).all()
    assert loader.dropped == {"spoilt: truncated": 1, "spoilt: not_an_image": 1, "spoilt: bad_category": 1}
    assert loader.num_images == 200 and all(seconds > 0 for seconds in loader.seconds.values())
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(one["source"], one["shard"], one["index"], one["reason"]) for one in told} == {
        ("spoilt", "000000.tar", 5, "truncated"),
        ("spoilt", "000000.tar", 60, "not_an_image"),
        ("spoilt", "000001.tar", 50, "bad_category"),
    }
    loader.close()


def test_what_was_dropped_is_told_once_whatever_the_kills_and_ranks(tmp_path: Path) -> None:
    broken = {**sample(0, has_text=False), "jpg": b"\xff\xd8 broken"}
    folder = spoilt(tmp_path, dict.fromkeys(range(0, 200, 10), broken))
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=1.0)

    def ranks(world: int, first: int, until: int) -> dict[str, int]:
        total: dict[str, int] = {}
        for rank in range(world):
            path = file_of(tmp_path, rank, world)
            loader = Loader(
                run, {"spoilt": folder}, None, rank=rank, world=world, start_step=first, dropped_to=path
            )
            list(islice(loader, until - first))
            loader.close()
            total |= {kind: total.get(kind, 0) + count for kind, count in loader.dropped.items()}
        return total

    ranks(2, 0, 7)  # killed, and begun again at step 5 by five ranks, at step 8 by one
    ranks(5, 5, 8)
    assert sum(ranks(1, 8, 10).values()) == 20
    assert [path.name for path in tmp_path.glob("dropped-*")] == ["dropped-rank_00000.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "dropped-rank_00000.jsonl").read_text().splitlines()]
    assert len(lines) == 20 == len({(line["shard"], line["index"]) for line in lines})
    assert {line["step"] for line in lines} <= set(range(10))


def test_the_replacement_is_the_next_sample_of_the_source(tmp_path: Path) -> None:
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=0.05)
    whole = [batch for batch, _ in islice(rounds(run, spoilt(tmp_path / "whole", {})), 10)]
    loader = Loader(run, {"spoilt": tmp_path / "whole" / "spoilt"}, None, rank=0, world=1)
    position = 47
    pick, following = (loader._steps._order[p] for p in (position, position + 1))
    number = pick.shard * 100 + pick.index
    folder = spoilt(tmp_path / "bad", {number: {**sample(0, has_text=False), "jpg": b""}})
    replaced = [batch for batch, _ in islice(rounds(run, folder), 10)]
    assert_same(joined(whole[:2] + whole[3:]), joined(replaced[:2] + replaced[3:]))
    assert int(replaced[2].category[7]) == (following.shard * 100 + following.index) % 3
    assert not torch.equal(whole[2].views[7], replaced[2].views[7])


def test_too_many_bad_samples_stop_the_run_with_counts_and_a_remedy(tmp_path: Path) -> None:
    broken = {**sample(0, has_text=False), "jpg": b"\xff\xd8 broken"}
    folder = spoilt(tmp_path, {index: broken for index in range(0, 200, 10)})  # 10 %
    run = small_run(data={"spoilt": Source("category")}, batch=20)
    with pytest.raises(
        DataError, match=r"samples read so far are bad \(spoilt: \w+ \d+; .*max_bad=0.01.*data_prep check"
    ):
        list(islice(rounds(run, folder), 10))


@pytest.mark.parametrize(("share", "stopped"), [(0.005, 0), (0.02, 200)])
def test_ranks_stop_for_a_share_above_the_limit_and_not_by_chance(share: float, stopped: int) -> None:
    """Of 200 ranks that read 20,000 samples each, as many as are given."""
    found = 0
    for rank in range(200):
        bad = np.cumsum(np.random.RandomState(rank).rand(20_000) < share)
        try:
            for num_reads in range(20, 20_001, 20):
                check_bad_share({"a": int(bad[num_reads - 1])}, num_reads, 0.01, "")
        except DataError:
            found += 1
    assert found == stopped


def test_one_of_many_shards_may_be_lost_and_one_of_few_may_not(tmp_path: Path) -> None:
    for num_shards, lasts in ((150, True), (10, False)):
        samples = [sample(n, has_text=False) for n in range(4)]
        folder = write_set(tmp_path / str(num_shards), [samples] * num_shards)
        run = small_run(data={"names": Source("category")}, batch=4, mixing=Mixing(window=2))
        loader = Loader(run, {"names": folder}, None, rank=0, world=1)
        (folder / f"{loader._steps._order[9].shard:06d}.tar").unlink()
        if lasts:
            list(islice(loader, 30))
            assert loader.dropped == {"names: missing_shard": 4}
            loader.close()
            with pytest.warns(UserWarning, match=r"is missing.*1 such shards"):
                assert (
                    len(batches(run, {"names": folder}, 20, start_step=2)) == 20
                )  # in the lost shard's window
        else:
            with pytest.raises(
                DataError, match=r"1 of 10 shards of source 'names' are lost \(\d+.tar; .*4 of 40"
            ):
                list(islice(loader, 30))
            loader.close()


def test_a_source_of_bad_samples_alone_ends_the_run(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "spoilt", [[{"jpg": b"", "cls": b"0", "json": b"{}"}] * 3])
    run = small_run(data={"spoilt": Source("category")}, max_bad=1.0)
    with pytest.raises(DataError, match="32 samples of source 'spoilt' in turn"):
        next(rounds(run, folder))


def test_a_broken_caption_is_a_reason(tmp_path: Path) -> None:
    samples = [sample(n, has_category=False) for n in range(40)]
    samples[7] = {**samples[7], "txt": b"caf\xe9", "json": b"{}"}
    samples[9] = {**samples[9], "txt": b" ", "json": b"{}"}
    samples[11] = {**samples[11], "json": b'{"captions": ["half of a pair: \\ud83d"]}'}
    samples[13] = {**samples[13], "json": b'{"captions": "one text, no list"}'}
    samples[15] = {**samples[15], "json": b"[" * 100_000}
    folder = write_set(tmp_path / "spoilt", [samples])
    write_tokenizer(folder / "tokenizer")
    run = small_run(data={"spoilt": Source("text")}, batch=40, max_bad=0.5)
    assert next(rounds(run, folder))[1] == {"spoilt: broken_text": 4, "spoilt: no_caption": 1}


def test_a_shard_that_goes_missing_is_replaced_and_counted(tmp_path: Path) -> None:
    folder = spoilt(tmp_path, {})
    run = small_run(data={"spoilt": Source("category")}, batch=20, max_bad=1.0)
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1)
    (folder / "000001.tar").unlink()
    assert next(loader).has_category.all()
    assert loader.dropped.keys() == {"spoilt: missing_shard"}
    loader.close()


def test_a_resume_goes_on_where_shards_were_lost_before_it(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "names", (6,) * 4, has_text=False)
    run = small_run(data={"names": Source("category")}, batch=8, max_bad=1.0)
    loader = Loader(run, {"names": folder}, None, rank=0, world=1)
    (folder / "000000.tar").unlink()
    for number, change in ((1, b"\0"), (2, b"")):
        content = (folder / f"{number:06d}.tar").read_bytes()
        (folder / f"{number:06d}.tar").write_bytes(change + content[1:] if change else content[:1024])
    straight = list(islice(loader, 6))
    assert sum(loader.dropped.values()) == 26  # of two passes: two shards, and a sample
    loader.close()
    with pytest.warns(UserWarning, match=r"000000.tar is missing.*\(3 such shards"):
        resumed = batches(run, {"names": folder}, 3, start_step=3)
    for one, other in zip(straight[3:], resumed, strict=True):
        assert_same(one, other)
    with pytest.raises(FileNotFoundError, match=r"000000.tar is missing"):
        Loader(run, {"names": folder}, None, rank=0, world=1)


def test_names_that_do_not_match_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"draws from \['talk'\], which have no folder: add talk=DIR to --data"
    ):
        Loader(small_run(), {"names": folders["names"]}, None, rank=0, world=1)
    with pytest.raises(
        ValueError, match=r"--data names \['speech'\], .* draws from \['names', 'talk'\] only"
    ):
        Loader(small_run(), {**folders, "speech": folders["talk"]}, None, rank=0, world=1)


def test_a_batch_that_the_ranks_cannot_share_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"batch=8 must be a multiple of 6 .3 ranks x 2 .* set --batch 12"):
        Loader(small_run(), folders, None, rank=0, world=3)


def test_labels_that_a_data_set_lacks_are_refused(folders: dict[str, Path]) -> None:
    swapped = {"names": folders["talk"], "talk": folders["names"]}
    with pytest.raises(ValueError, match=r"has no categories, data.names.supervision='category' needs"):
        Loader(small_run(), swapped, None, rank=0, world=1)
    with pytest.raises(ValueError, match=r"has no captions, data.talk.supervision='text' needs"):
        Loader(small_run(), {**folders, "talk": folders["names"]}, None, rank=0, world=1)


def test_a_text_source_without_tokenizer_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    talk = good_set(tmp_path / "talk", (4,), has_category=False)
    run = small_run(data={"talk": Source("text")})
    with pytest.raises(FileNotFoundError, match=r"talk/tokenizer is no folder.*--tokenizer"):
        Loader(run, {"talk": talk}, None, rank=0, world=1)
    with pytest.raises(ValueError, match=r"holds no Hugging Face tokenizer"):
        Loader(run, {"talk": talk}, talk, rank=0, world=1)
    loader = Loader(run, {"talk": talk}, folders["talk"] / "tokenizer", rank=0, world=1)
    assert loader.facts.vocab_size == 15
    loader.close()


def test_a_tokenizer_that_nothing_reads_is_refused(folders: dict[str, Path]) -> None:
    run = small_run(data={"names": Source("category")})
    with pytest.raises(ValueError, match=r"tokenizer=.* would be ignored"):
        Loader(run, {"names": folders["names"]}, folders["talk"] / "tokenizer", rank=0, world=1)


def test_labels_that_no_target_predicts_are_refused(folders: dict[str, Path]) -> None:
    objective = Objective(Input(), {"text": Target("text", "boltzmann")})
    run = small_run(data={"names": Source("category")}, objective=objective)
    with pytest.raises(
        ValueError, match=r"data\.names\.supervision='category' would be ignored, .* predicts \['text'\]"
    ):
        Loader(run, {"names": folders["names"]}, None, rank=0, world=1)


def test_a_changed_shard_is_named_before_the_first_step(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "names", has_text=False)
    shard = folder / "000001.tar"
    content = bytearray(shard.read_bytes())
    content[1500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001.tar has sha256 .* the manifest says .* copy it again"):
        Loader(small_run(data={"names": Source("category")}), {"names": folder}, None, rank=0, world=1)


def test_a_closed_loader_says_so_and_leaves_no_worker(folders: dict[str, Path]) -> None:
    loader = Loader(small_run(), folders, None, rank=0, world=1, workers=1)
    next(loader)
    assert len(multiprocessing.active_children()) == 1
    loader.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


KILLED_TRAINER = """
import os, pickle, signal, sys
from pretrain.data.loader import Loader

if __name__ == "__main__":
    run, folders = pickle.load(open(sys.argv[1], "rb"))
    loader = Loader(run, folders, None, rank=0, world=1, workers=1)
    next(loader)
    import multiprocessing
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(folders: dict[str, Path]) -> None:
    run = small_run()
    loader = Loader(run, folders, None, rank=0, world=1, workers=2)
    delivered = [next(loader)]
    with pytest.warns(
        UserWarning, match=r"worker processes \[\d+\] of the loader died at step \d: new ones go on"
    ):
        os.kill(loader._made._deliveries._workers[0].pid, signal.SIGKILL)
        delivered += islice(loader, 7)
    loader.close()
    for one, other in zip(delivered, batches(run, folders, 8), strict=True):
        assert_same(one, other)


def test_a_worker_that_is_killed_while_it_sends_large_files_is_replaced(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (400, 500, 3)).astype(np.uint8)
    jpeg = encoded(noise, quality=95)  # more than a pipe takes at once
    assert len(jpeg) > 2**17
    folder = write_set(tmp_path / "large", [[{"jpg": jpeg, "cls": b"0", "json": b"{}"}] * 8])
    run = small_run(data={"large": Source("category")}, views=Views(size=16, on_device="all"))
    loader = Loader(run, {"large": folder}, None, rank=0, world=1, workers=1)
    next(loader)
    with pytest.warns(UserWarning, match=r"died at step \d: new ones go on"):
        os.kill(loader._made._deliveries._workers[0].pid, signal.SIGKILL)
        list(islice(loader, 6))
    loader.close()


def test_what_is_wrong_with_the_data_is_told_without_a_workers_traceback(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "spoilt", [[{"jpg": b"", "cls": b"0", "json": b"{}"}] * 3])
    run = small_run(data={"spoilt": Source("category")}, max_bad=1.0)
    loader = Loader(run, {"spoilt": folder}, None, rank=0, world=1, workers=1)
    for _ in range(2):  # and again to whoever asks again
        with pytest.raises(DataError, match=r"^32 samples of source 'spoilt' in turn cannot be used"):
            next(loader)
    loader.close()


def test_more_workers_than_have_a_use_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"workers=100000 must lie in \[0, \d+\], 16 a core"):
        Loader(small_run(), folders, None, rank=0, world=1, workers=100_000)


def test_workers_that_keep_dying_end_the_run_with_a_remedy(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.workers.MAX_DEATHS", 0)
    loader = Loader(small_run(), folders, None, rank=0, world=1, workers=1)
    next(loader)
    os.kill(loader._made._deliveries._workers[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"for the 1. time: .* lower --workers"):
        list(islice(loader, 9))
    loader.close()


def test_workers_end_when_the_trainer_is_killed(tmp_path: Path, folders: dict[str, Path]) -> None:
    run = small_run(data={"names": Source("category")})
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((run, {"names": folders["names"]})))
    (tmp_path / "trainer.py").write_text(KILLED_TRAINER)
    trainer = subprocess.run(
        [sys.executable, tmp_path / "trainer.py", tmp_path / "job.pickle"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    assert trainer.returncode == -signal.SIGKILL
    (worker,) = map(int, trainer.stdout.split())
    with contextlib.suppress(ProcessLookupError):  # ended already
        ended = os.pidfd_open(worker)
        assert select.select([ended], [], [], 20)[0], "the worker outlives its trainer by 20 seconds"
        os.close(ended)

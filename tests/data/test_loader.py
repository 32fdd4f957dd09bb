"""Does a rank get the batch that seed and position decide, whatever the machine looks like?"""

from __future__ import annotations

import dataclasses
import select
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from data_prep.labels import fill_prompt
from data_prep.schema import Manifest
from pretrain.config import Mixing, Source, Views
from pretrain.data.batch import NO_CATEGORY
from pretrain.data.faults import DataError, Dropped
from pretrain.data.loader import Loader
from pretrain.data.memory import require_memory
from pretrain.data.packed import Packed, pack, unpack
from pretrain.data.room import Rooms, give_back, in_one, room_for
from pretrain.data.sources import open_sources
from pretrain.data.steps import Steps
from pretrain.data.text import Captions
from pretrain.objective import Input, Objective, Target
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import CATEGORIES, good_set, sample, small_run, write_set, write_tokenizer


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


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_that_are_left_out_are_holes_in_the_order(folders: dict[str, Path], workers: int) -> None:
    straight = batches(small_run(), folders, 7)
    holes = batches(small_run(), folders, 3, workers=workers, start_step=1, left_out={1, 2, 4})
    for batch, number in zip(holes, (3, 5, 6), strict=True):
        assert_same(batch, straight[number])


def test_a_sample_is_found_by_its_position(folders: dict[str, Path]) -> None:
    loader = Loader(small_run(), folders, None, rank=0, world=1)
    batch = next(loader)
    for found, category in zip(loader.samples(batch.position.tolist()), batch.category.tolist(), strict=True):
        shard, index = found["shard"], found["index"]
        assert found["key"] == f"{int(shard.removesuffix('.tar')):06d}_{index:06d}"
        assert (found["source"] == "names") == (category != NO_CATEGORY)
    loader.close()


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
        assert loader.facts.num_samples == {"both": Manifest.read(folder).num_samples}
        loader.close()


def test_captions_longer_than_the_text_are_counted(folders: dict[str, Path]) -> None:
    run = small_run(data={"talk": Source("text")}, batch=12)
    loader = Loader(run, {"talk": folders["talk"]}, None, rank=0, world=1, workers=1)
    whole = replace(run, text=replace(run.text, length=40))
    long = Loader(whole, {"talk": folders["talk"]}, None, rank=0, world=1)
    for _ in range(4):
        batch, uncut = next(loader), next(long)
    assert loader.num_captions == long.num_captions == 48 and long.num_cut == 0
    assert loader.captions == {"delivered": 48, "tokens": loader.num_tokens, "cut": loader.num_cut}
    assert 48 * 5 <= loader.num_tokens < long.num_tokens <= 48 * 14  # 3 to 12 words, and 2 special tokens
    assert 0 < loader.num_cut < 48
    assert bool((uncut.token_mask.sum(1) > 10).any()) and int(batch.token_mask.sum(1).max()) == 10
    loader.close()
    long.close()


def test_a_batch_is_held_once_and_a_large_one_is_told(folders: dict[str, Path]) -> None:
    run = small_run(data={"names": Source("category")})
    sources = open_sources(run, {"names": folders["names"]}, None)
    made = Steps(run, sources, 0, 1).make(3, Rooms())
    packed = pack(made)
    assert packed.buffer.data_ptr() == made.batch.views.untyped_storage().data_ptr()
    assert packed.buffer.is_shared()
    again, plain = unpack(packed).batch, Steps(run, sources, 0, 1)[3].batch
    for field in dataclasses.fields(plain):
        assert torch.equal(getattr(again, field.name), getattr(plain, field.name))
    # 352 images of two views at 224 px took 1,523 MiB (`peak` of benchmarks/loader_wait.py), 1,536 are promised.
    told = replace(run, views=replace(run.views, size=224))
    require_memory(replace(told, batch=352), world=1, workers=1)
    with pytest.warns(
        UserWarning,
        match=r"each of 1 workers may take 1\.51 GiB, with room for 3 batches of 0\.10 .*more ranks",
    ):
        require_memory(replace(told, batch=368), world=1, workers=1)


@pytest.mark.parametrize(("workers", "needed"), [(0, 2 * 3072), (2, 2 * 2 * 3 * 3072)])
def test_batches_that_no_memory_of_this_machine_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, needed: int
) -> None:
    """Two of the four ranks are here, each with 2 images of two views at 16 px a batch, which has room for them
    wherever they are made."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    meminfo, limit, run = tmp_path / "meminfo", tmp_path / "memory.max", small_run()
    meminfo.write_text("MemTotal: 1024 kB\n")
    limit.write_text(f"{needed}\n")
    require_memory(run, 4, workers, meminfo=meminfo, groups=[tmp_path])
    limit.write_text(f"{needed - 1}\n")
    told = rf"batch=8 of views\.size=16 is .*--workers {workers} .* 2 ranks here .*memory: lower batch, views\.size"
    for on_device in ("none", "colours", "all"):  # the room of a batch is the same, whoever fills it
        left = replace(run, views=replace(run.views, on_device=on_device))
        with pytest.raises(ValueError, match=told):
            require_memory(left, 4, workers, meminfo=meminfo, groups=[tmp_path])
    monkeypatch.delenv("LOCAL_SIZE")  # as a launcher that does not say it: the others may be elsewhere
    require_memory(run, 4, workers, meminfo=meminfo, groups=[tmp_path])
    limit.write_text("max\n")
    large = replace(run, batch=8 * 2**10)
    with pytest.raises(ValueError, match=r"more than the 0\.00 of this machine's memory"):
        require_memory(large, 4, workers, meminfo=meminfo, groups=[tmp_path])


def test_a_loader_is_not_opened_for_batches_beyond_memory(folders: dict[str, Path]) -> None:
    run = small_run(views=Views(size=2**20))
    with pytest.raises(
        ValueError, match=r"batch=8 of views\.size=1048576 is 49152\.00 GiB of views on a rank"
    ):
        Loader(run, folders, None, rank=0, world=1)


def test_shared_memory_is_written_again_only_after_it_was_copied(folders: dict[str, Path]) -> None:
    run = small_run(data={"names": Source("category")})
    steps, rooms = Steps(run, open_sources(run, {"names": folders["names"]}, None), 0, 1), Rooms()
    plain = [steps[step].batch for step in range(4)]

    def place(packed: Packed) -> int:
        return packed.buffer.data_ptr()

    first, second = pack(steps.make(0, rooms), rooms), pack(steps.make(1, rooms), rooms)
    assert place(first) != place(second)
    own = first.taken()
    assert place(own) not in (place(first), place(second)) and not own.buffer.is_shared()
    third, fourth = pack(steps.make(2, rooms), rooms), pack(steps.make(3, rooms), rooms)
    assert place(third) == place(first) and place(fourth) not in (place(first), place(second))
    for packed, wanted in zip((own, second, third, fourth), plain, strict=True):
        again = unpack(packed).batch
        assert all(
            torch.equal(getattr(again, field.name), getattr(wanted, field.name))
            for field in dataclasses.fields(wanted)
        )
    not_lent = pack(steps[0], rooms)
    not_lent.buffer[-1] = 7
    not_lent.taken()
    assert not_lent.buffer[-1] == 7, "it is no room of the sender's"
    given_back = rooms.take(2**20)
    give_back(given_back)
    assert rooms.take(2**20 + 8).data_ptr() != given_back.data_ptr(), "of another size"


@pytest.mark.parametrize("on_device", ["none", "all"])
def test_the_message_of_a_large_batch_goes_through_a_pipe_in_one_piece(
    folders: dict[str, Path], on_device: str
) -> None:
    """The trainer would wait for ever for the rest of one whose worker is killed in the middle."""
    views = Views(size=16, on_device=on_device)
    run = small_run(data={"names": Source("category")}, batch=512, views=views)
    made = Steps(run, open_sources(run, {"names": folders["names"]}, None), 0, 1).make(0, Rooms())
    made = made._replace(
        dropped=(Dropped("names", "000000.tar", 7, "truncated", "a long message " * 9),) * 200
    )
    sent = pack(made)
    assert len(ForkingPickler.dumps((0, sent))) < select.PIPE_BUF
    again = unpack(sent.taken())
    assert again.dropped == made.dropped and again.num_images == 512
    if made.unfinished is not None:
        assert (
            again.unfinished.files == made.unfinished.files and again.unfinished.rows == made.unfinished.rows
        )


def test_no_room_in_shared_memory_is_told_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(DataError, match=r"a batch of 2 MiB \(unable to.*--shm-size.*or lower --workers"):
        room_for({"views": (torch.uint8, (2, 2**20))}, Rooms())
    with pytest.raises(DataError, match=r"a batch of 1 MiB \(unable to"):
        in_one([torch.zeros(2**18)], is_shared=True)


def test_what_the_device_has_left_to_do_is_shared_with_the_batch(folders: dict[str, Path]) -> None:
    for on_device in ("colours", "all"):
        run = small_run(data={"names": Source("category")}, views=Views(size=16, on_device=on_device))
        sources = open_sources(run, {"names": folders["names"]}, None)
        made = Steps(run, sources, 0, 1).make(3, Rooms())
        packed, plain = pack(made), made.unfinished
        # A tensor that is shared only when it is sent is lost with the batch where there is no room.
        assert packed.left.is_shared()
        again = unpack(packed).unfinished
        assert torch.equal(again.changes, plain.changes) and again.files == plain.files
        assert bool(again.files) == (on_device == "all")
        assert not pack(Steps(run, sources, 0, 1)[3]).left.is_shared()


def test_categories_become_captions_by_prompts(tmp_path: Path, folders: dict[str, Path]) -> None:
    prompts = ("a red {}", "the sun sees {}")
    run = small_run(data={"names": Source("text", prompts=prompts)}, batch=20)
    names, tokenizer = {"names": folders["names"]}, folders["talk"] / "tokenizer"
    batch = joined(batches(run, names, 4, tokenizer=tokenizer))
    captions = Captions(tokenizer, run.text.length)
    told = {tuple(captions.encode(fill_prompt(p, c))[0].tolist()) for p in prompts for c in CATEGORIES}
    assert {tuple(row) for row in batch.tokens.tolist()} == told
    by_category = joined(batches(small_run(data={"names": Source("category")}, batch=20), names, 4)).category
    for row, category in zip(batch.tokens, by_category, strict=True):
        said = [captions.encode(fill_prompt(prompt, CATEGORIES[category]))[0] for prompt in prompts]
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

"""Which tags does a batch tell of an image, and which does it leave out?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.build import Options, build
from data_prep.sources.scenes import Scenes, draw_scene
from pretrain.config import Run, Source, Tags
from pretrain.data.batch import MOST_TAGS, NO_TAG
from pretrain.data.loader import Loader
from pretrain.objective import Input, Objective, Target
from pretrain.report.pairs import read_pairs
from tests.data.delivered import assert_same, batches, joined
from tests.data.sets import good_set, sample, small_run, write_set

TAGS = Target("tags", "bernoulli", "same", "raw", "none")


def tag_run(*sources: str, **changes: object) -> Run:
    """Plain images with tags of every source."""
    data = {name: Source("tags") for name in sources}
    settings = {"objective": Objective(Input(), {"tags": TAGS}), "data": data, "batch": 4, **changes}
    return small_run(**settings)


def tag_set(folder: Path, names: tuple[str, ...], *tags: object) -> Path:
    """A data set of one sample for each of `tags`."""
    samples = [sample(n, has_text=False, tags=told) for n, told in enumerate(tags)]
    return write_set(folder, [samples], tags=names)


def told(run: Run, folders: dict[str, Path], num: int = 1) -> list[list[int]]:
    """Tag numbers of every image without the padding, sorted by image."""
    rows = joined(batches(run, folders, num)).tags.tolist()
    assert all(len(row) == MOST_TAGS and set(row[row.index(NO_TAG) :]) == {NO_TAG} for row in rows)
    return sorted(row[: row.index(NO_TAG)] for row in rows)


def test_tags_of_built_scenes_are_the_kinds_of_their_objects(tmp_path: Path) -> None:
    (collection,) = Scenes(count=6, heldout=0, size=32).collections()
    build(collection, tmp_path / "scenes", Options(workers=1))
    run, folders = tag_run("scenes", batch=6, tags=Tags(min_score=0)), {"scenes": tmp_path / "scenes"}
    loader = Loader(run, folders, None, rank=0, world=1)
    names = loader.facts.tags
    loader.close()
    told_kinds = [{names[tag] for tag in row} for row in told(run, folders)]
    kinds = [{seen.kind for seen in draw_scene(index, 0, 32)[1].objects} for index in range(6)]
    assert sorted(map(sorted, told_kinds)) == sorted(map(sorted, kinds))


def test_equal_names_of_two_vocabularies_are_one_tag(tmp_path: Path) -> None:
    first = tag_set(tmp_path / "first", ("sun", "sea", "cat"), [["sea", 1.0]], [["cat", 0.9], ["sun", 0.8]])
    second = tag_set(tmp_path / "second", ("dog", "cat"), [["cat", 1.0]], [["dog", 1]])
    run, folders = tag_run("first", "second"), {"first": first, "second": second}
    loader = Loader(run, folders, None, rank=0, world=1)
    assert loader.facts.tags == ("sun", "sea", "cat", "dog")
    loader.close()
    assert told(run, folders) == [[1], [2], [2, 0], [3]]


def test_a_tag_counts_from_the_confidence_that_the_run_asks_for(tmp_path: Path) -> None:
    tags = [["a", 0.49], ["b", 0.5], ["c", 0.7]], [["a", 0.1]], [], [["b", 0.6]]
    folders = {"pets": tag_set(tmp_path / "pets", ("a", "b", "c"), *tags)}
    run = tag_run("pets")  # min_score 0.5
    assert told(run, folders) == [[], [], [1], [2, 1]]  # most confident first
    assert told(replace(run, tags=Tags(min_score=0.65)), folders) == [[], [], [], [2]]
    assert batches(run, folders, 1)[0].has_tags.all()  # also where no tag is sure enough


def test_a_tag_told_twice_counts_once_with_its_higher_confidence(tmp_path: Path) -> None:
    folders = {
        "pets": tag_set(tmp_path / "pets", ("a", "b"), [["a", 0.9], ["b", 0.8], ["a", 0.6], ["b", 1.0]])
    }
    assert told(tag_run("pets", batch=1), folders) == [[1, 0]]


def test_of_more_tags_than_fit_the_most_confident_are_kept(tmp_path: Path) -> None:
    names = tuple(f"tag{n}" for n in range(MOST_TAGS + 10))
    tags = [[name, 0.5 + n / 200] for n, name in enumerate(names)]
    batch = batches(tag_run("pets", batch=1), {"pets": tag_set(tmp_path / "pets", names, tags)}, 1)[0]
    assert batch.tags.tolist() == [list(range(MOST_TAGS + 9, 9, -1))]


def test_only_sources_asked_for_tags_give_them_and_the_width_is_the_same_all_through_the_run(
    tmp_path: Path,
) -> None:
    folder = tag_set(tmp_path / "pets", ("a", "b"), *[[["b", 1.0]]] * 6)
    targets = {"tags": TAGS, "category": Target("category", "boltzmann")}
    data = {"told": Source("tags"), "plain": Source("none"), "named": Source("category")}
    run = small_run(objective=Objective(Input(), targets), data=data, batch=2)
    delivered = batches(run, dict.fromkeys(data, folder), 12)
    assert {batch.tags.shape for batch in delivered} == {(2, MOST_TAGS)}
    batch = joined(delivered)
    assert 7 <= int(batch.has_tags.sum()) <= 9 and not (batch.has_tags & batch.has_category).any()
    assert torch.equal(batch.tags[:, 0], torch.where(batch.has_tags, 1, NO_TAG))
    without = batches(replace(run, data={"plain": Source("none")}), {"plain": folder}, 1)[0]
    assert without.tags.shape == (2, 0) and not without.has_tags.any()


@pytest.mark.parametrize("bad", [None, "a", [["a"]], [["a", 2.0]], [["unheard", 0.9]], [["a", "0.9"]]])
def test_malformed_tags_are_a_reason_and_cost_only_their_sample(tmp_path: Path, bad: object) -> None:
    folder = tag_set(tmp_path / "pets", ("a",), *[[["a", 1.0]]] * 4, bad)
    run = tag_run("pets", batch=5, max_bad=0.5)
    loader = Loader(run, {"pets": folder}, None, rank=0, world=1)
    assert next(loader).tags[:, 0].tolist() == [0] * 5
    assert loader.dropped == {"pets: bad_tags": 1}
    loader.close()
    examples = [pair.examples[0] for pair in read_pairs(run, {"pets": folder}, None, 5)]
    assert {example.tags for example in examples} == {("a",)} and "000000_000004" not in {
        e.key for e in examples
    }


def test_a_record_that_is_no_json_is_a_reason(tmp_path: Path) -> None:
    samples = [sample(n, has_text=False, tags=[["a", 1.0]]) for n in range(5)]
    samples[1]["json"], samples[2]["json"] = b"{", b"[]"
    del samples[3]["json"]
    folder = write_set(tmp_path / "pets", [samples], tags=("a",))
    loader = Loader(tag_run("pets", batch=5, max_bad=0.9), {"pets": folder}, None, rank=0, world=1)
    next(loader)
    assert loader.dropped.keys() == {"pets: bad_tags"} and loader.dropped["pets: bad_tags"] >= 3
    loader.close()


def test_images_without_any_sure_tag_are_told_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    unsure = tag_set(tmp_path / "unsure", ("a",), *[[["a", 0.1]]] * 5)
    batches(tag_run("unsure", batch=20), {"unsure": unsure}, 9)
    (told,) = [str(warning.message) for warning in recwarn if "tags.min_score" in str(warning.message)]
    assert told.startswith("none of the first 80 images has a tag of confidence 0.5") and "lower it" in told
    recwarn.clear()
    one = tag_set(tmp_path / "one", ("a",), *[[["a", 0.1]]] * 4, [["a", 0.9]])
    batches(tag_run("one", batch=20), {"one": one}, 9)
    assert not [warning for warning in recwarn if "tags.min_score" in str(warning.message)]


def test_a_data_set_whose_manifest_names_no_tags_is_refused(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "names")
    with pytest.raises(
        ValueError, match=r"has no tags, data.names.supervision='tags' needs their names .* build it"
    ):
        Loader(tag_run("names"), {"names": folder}, None, rank=0, world=1)


def test_tags_that_no_target_predicts_are_refused(tmp_path: Path) -> None:
    folder = tag_set(tmp_path / "pets", ("a",), [["a", 1.0]])
    run = small_run(data={"pets": Source("tags")})
    with pytest.raises(ValueError, match=r"data\.pets\.supervision='tags' would be ignored"):
        Loader(run, {"pets": folder}, None, rank=0, world=1)


def test_ranks_and_workers_see_the_same_tags(tmp_path: Path) -> None:
    tags = [[[name, 0.9]] for name in "abcd"]
    folders = {"pets": tag_set(tmp_path / "pets", tuple("abcd"), *tags)}
    alone = batches(tag_run("pets"), folders, 3)
    ranks = [batches(tag_run("pets"), folders, 3, rank=rank, world=2, workers=rank) for rank in (0, 1)]
    for step in range(3):
        assert_same(alone[step], joined([rank[step] for rank in ranks]))

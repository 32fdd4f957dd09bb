"""Are the embedded scenes deterministic, true to their words, and unsolvable by colour alone?"""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from data_prep.samples import members
from data_prep.sources import grammar
from data_prep.sources.layout import APART, Facts, arrange, observe
from data_prep.sources.scenes import CATEGORIES, Scenes, draw_scene, make_scene
from data_prep.sources.surfaces import COLORS

SIZE = 64
SCENES = range(60)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, Facts, tuple[str, ...]]]:
    return [draw_scene(index, 0, SIZE) for index in SCENES]


def test_the_same_seed_and_index_give_the_same_bytes():
    first, second = (members(make_scene(7, seed=3, size=SIZE).sample) for _ in range(2))
    assert first == second


def test_other_seeds_and_indices_give_other_pictures():
    pictures = {make_scene(index, seed=seed, size=SIZE).sample.image for index in (0, 1) for seed in (0, 1)}
    assert len(pictures) == 4


def test_every_block_of_scenes_holds_every_category_once():
    block = [make_scene(index, seed=0, size=32).sample.category for index in range(len(CATEGORIES))]
    assert sorted(block) == list(range(len(CATEGORIES)))
    assert len(CATEGORIES) >= 20


def test_the_splits_share_no_scene_and_have_the_asked_sizes():
    train, heldout = Scenes(count=80, heldout=0.125).collections()
    assert (train.split, len(train.items), heldout.split, len(heldout.items)) == ("train", 70, "heldout", 10)
    assert not set(train.items) & set(heldout.items)


def test_the_salient_object_is_the_biggest_near_the_centre_and_mostly_seen(scenes):
    for _, facts, _ in scenes:
        salient, *others = facts.objects
        x0, y0, x1, y1 = salient.box
        assert 0.11 <= salient.area <= 0.36
        assert all(other.area < salient.area / 2 for other in others)
        assert np.hypot((x0 + x1) / 2 - SIZE / 2, (y0 + y1) / 2 - SIZE / 2) < 0.22 * SIZE
        assert salient.visible >= 0.88
        assert all(other.visible >= 0.45 for other in others)
    assert {len(facts.objects) for _, facts, _ in scenes} == {1, 2, 3, 4}


def test_boxes_and_areas_are_those_of_the_mask(scenes):
    for index, (_, facts, _) in zip(SCENES, scenes, strict=True):
        mask = np.asarray(Image.open(io.BytesIO(make_scene(index, seed=0, size=SIZE).sample.mask)))
        assert np.array_equal(mask, facts.mask)
        for number, seen in enumerate(facts.objects, start=1):
            rows, columns = np.nonzero(mask == number)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert seen.box == box
            assert seen.area == pytest.approx((mask == number).mean())


def test_behind_means_hidden_by_a_nearer_object():
    found = 0
    for seed in range(40):
        scene = arrange(np.random.default_rng(seed), "star", SIZE)
        facts = observe(scene, SIZE)
        place = {thing.kind: i for i, thing in enumerate(scene.things)}
        for first, name, second in facts.relations:
            if name == "behind":
                far, near = (place[facts.objects[i].kind] for i in (first, second))
                shared = scene.cutouts[far].on_canvas(SIZE) & scene.cutouts[near].on_canvas(SIZE)
                assert far < near and shared.any()
                assert facts.objects[first].visible < 0.95
                found += 1
    assert found > 5


# --- reading captions back: the words of the grammar's tables, and nothing of its code


def _named(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: fact for fact, words in table.items() for word in words}


KINDS = _named({kind: grammar.KIND_WORDS.get(kind, (kind,)) for kind in CATEGORIES})
SIZES = _named(grammar.SIZE_WORDS)
BEFORE, AFTER = _named(grammar.TEXTURE_WORDS), _named(grammar.TEXTURE_TAILS)
COLOURS = _named({color: grammar.COLOR_WORDS.get(color, (color,)) for color in COLORS})
RELATIONS = _named(grammar.RELATION_WORDS)
GROUNDS = _named(grammar.GROUND_WORDS)


def _any(words: dict[str, str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


NOUN = re.compile(
    rf"\b(?:a|an|the) (?:(?P<size>{_any(SIZES)}) )?(?:(?P<before>{_any(BEFORE)}) )?(?:(?P<color>{_any(COLOURS)}) )?"
    rf"(?P<kind>{_any(KINDS)})\b(?: (?P<after>{_any(AFTER)}))?"
)
JOINED = re.compile(rf"#(\d+) (?:is )?({_any(RELATIONS)}) #(\d+)")
COLOURED = re.compile(rf"#(\d+) is ({_any(COLOURS)}) and ({_any(SIZES)})")


def _check_caption(caption: str, facts: Facts) -> int:
    """Assert everything a caption says; returns how many relations it told."""
    text = caption.lower().rstrip(".")
    place = {seen.kind: i for i, seen in enumerate(facts.objects)}

    def read(match: re.Match) -> str:
        seen = facts.objects[place[KINDS[match["kind"]]]]  # KeyError: it names an object that is not there
        assert match["size"] is None or SIZES[match["size"]] == seen.size, caption
        assert match["color"] is None or COLOURS[match["color"]] == seen.color, caption
        assert match["before"] is None or BEFORE[match["before"]] == seen.texture, caption
        assert match["after"] is None or AFTER[match["after"]] == seen.texture, caption
        return f"#{place[seen.kind]}"

    text = NOUN.sub(read, text)
    told = JOINED.findall(text)
    for first, words, second in told:
        assert (int(first), RELATIONS[words], int(second)) in facts.relations, caption
    for number, color, size in COLOURED.findall(text):
        assert COLOURS[color] == facts.objects[int(number)].color, caption
        assert SIZES[size] == facts.objects[int(number)].size, caption
    for words, ground in GROUNDS.items():
        assert words not in text or ground == facts.background, caption
    left = JOINED.sub("", COLOURED.sub("", text))
    phrases = "|".join(sorted((*GROUNDS, *grammar.OPENERS, "and"), key=len, reverse=True))
    left = re.sub(rf"\b(?:{phrases})\b|,", "", left)
    assert not re.sub(r"#\d+", "", left).strip(), f"unread words {left!r} in {caption!r}"
    assert "#0" in text, f"{caption!r} does not name the salient object"
    return len(told)


def test_captions_say_only_true_things_and_name_the_salient_object(scenes):
    num_told = sum(_check_caption(caption, facts) for _, facts, told in scenes for caption in told)
    assert num_told > 20, "too few relations to have tested them"


def test_relations_hold_between_the_boxes(scenes):
    axes = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
    for _, facts, _ in scenes:
        for first, name, second in facts.relations:
            if name in axes:
                axis, sign = axes[name]
                a, b = facts.objects[first].box, facts.objects[second].box
                apart = (b[axis] + b[axis + 2] - a[axis] - a[axis + 2]) / 2 / SIZE
                assert sign * apart >= APART - 1e-6


def test_captions_are_varied(scenes):
    told = [caption.lower().rstrip(".") for _, _, captions in scenes for caption in captions]
    assert all(len({caption.lower() for caption in captions}) == 3 for _, _, captions in scenes)
    assert len(set(told)) > 0.9 * len(told)


def test_a_false_caption_would_be_noticed(scenes):
    facts = next(facts for _, facts, _ in scenes if facts.objects[0].color not in ("red",))
    with pytest.raises(AssertionError):
        _check_caption(f"a photo of a red {facts.objects[0].kind}", facts)


def test_colour_histograms_do_not_tell_the_category():
    size, num_train, num_test = 32, 600, 360
    features, labels = [], []
    for index in range(num_train + num_test):
        picture, facts, _ = draw_scene(index, 0, size)
        codes = (picture // 32).astype(np.int64) @ np.array([64, 8, 1])
        features.append(np.sqrt(np.bincount(codes.ravel(), minlength=512) / size**2))
        labels.append(CATEGORIES.index(facts.objects[0].kind))
    features, labels = np.array(features), np.array(labels)
    train, test = slice(0, num_train), slice(num_train, None)
    scaled = StandardScaler().fit(features[train]).transform(features)
    chance = 1 / len(CATEGORIES)
    for model, inputs in (
        (KNeighborsClassifier(20), features),
        (LogisticRegression(C=0.01, max_iter=200), scaled),
    ):
        accuracy = model.fit(inputs[train], labels[train]).score(inputs[test], labels[test])
        assert accuracy < 2 * chance, f"{type(model).__name__}: {accuracy:.3f}, chance {chance:.3f}"

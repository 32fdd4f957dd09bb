"""Are the frozen tables of classes those that published heads have?"""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_prep.labels import fill_prompt
from data_prep.sources.synsets import CHOICES, classes_of, named, plain_name, words_of

INFO = Path(find_spec("timm").origin).parent / "data" / "_info"  # read as files: importing timm takes seconds
PUBLISHED = {  # ours -> timm's file
    "1k": "imagenet_synsets.txt",
    "12k": "imagenet12k_synsets.txt",
    "22k": "imagenet22k_synsets.txt",
    "22k-ms": "imagenet22k_ms_synsets.txt",
    "21k-goog": "imagenet21k_goog_synsets.txt",
    "21k-p-fall11": "imagenet21k_miil_synsets.txt",
    "21k-p-winter21": "imagenet21k_miil_w21_synsets.txt",
}


@pytest.mark.parametrize("table", PUBLISHED)
def test_a_table_is_the_one_of_timm_in_its_order(table):
    assert list(classes_of(table).synsets) == (INFO / PUBLISHED[table]).read_text().split()


def test_the_words_of_every_synset_are_those_of_timm():
    with open(INFO / "imagenet_synset_to_lemma.txt", newline="") as file:
        words = dict(csv.reader(file, delimiter="\t"))
    ours = {synset for table in CHOICES for synset in classes_of(table).synsets}
    assert {synset: words_of(synset) for synset in ours} == {synset: words[synset] for synset in ours}
    assert len(ours) == 21_844


def test_the_order_of_swin_moves_the_last_two_of_google_into_the_gaps():
    google, swin = classes_of("21k-goog").synsets, classes_of("22k-swin").synsets
    assert len(swin) == 21_841 and swin[9205] == google[21_841] and swin[15027] == google[21_842]
    assert [place for place in range(21_841) if swin[place] != google[place]] == [9205, 15027]
    assert set(swin) == set(classes_of("22k").synsets)


@pytest.mark.parametrize("table", CHOICES)
def test_every_class_has_a_name_of_its_own(table):
    names = classes_of(table).names
    assert len(set(names)) == len(names)


def test_names_fit_into_sentences():
    crane = named(("n02012849", "n03126707", "n01440764"))
    assert crane.names == ("crane (n02012849)", "crane (n03126707)", "tench")
    assert fill_prompt("a photo of {}.", plain_name(crane.names[0])) == "a photo of a crane."
    with pytest.raises(ValueError, match="no synsets of ImageNet"):
        named(("n99999999",))
    with pytest.raises(ValueError, match="choose from"):
        classes_of("imagenet")

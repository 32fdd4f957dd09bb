"""Are a caption's tokens those of the whole caption, however long it is, and does it cost little?"""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from data_prep.rows.captions import plain
from data_prep.tokenizer import train_tokenizer
from pretrain.data.faults import BadSample
from pretrain.data.text import LETTERS, MOST_LETTERS, Captions, captions_of
from tests.data.sets import WORDS, write_set, write_tokenizer

SHORT, LONG = 4, 12  # tokens
LEARNED_FROM = "a red ant sees the sun; das Grün; ein Füchslein, 赤い猫が眠る, ส้มโอหวานมาก, don't 12:30"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The builder's tokenizer, which takes words to pieces down to letters."""
    folder = tmp_path_factory.mktemp("learned") / "set"
    record = json.dumps({"captions": [LEARNED_FROM]}).encode()
    write_set(folder, [[{"jpg": b"", "txt": LEARNED_FROM.encode(), "json": record}]])
    train_tokenizer(folder, ["000000.tar"], 300)
    return folder / "tokenizer"


@cache
def both(folder: Path, length: int) -> tuple[Captions, Tokenizer]:
    """Our reading of captions, and the tokenizer that sees the whole."""
    captions = Captions(folder, length)
    return captions, captions._tokenizer


ordinary = st.sampled_from([*WORDS, "Grün", "Füchslein,", "don't", "12:30", "e\u0301e\u0301"])
dense = st.text("赤い猫が眠る", min_size=1, max_size=400)
endless = st.builds(
    lambda unit, times: unit * times,
    st.sampled_from(["a", "-", "ส้มโอ", "sun", "e\u0301"]),
    st.integers(1, 900),
)
gaps = st.sampled_from([" ", " ", " ", "", "\n", " " * 300])
texts = st.lists(st.tuples(ordinary | dense | endless, gaps), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(parts=texts, length=st.sampled_from([SHORT, LONG]))
def test_any_caption_has_the_tokens_of_the_whole(
    learned: Path, parts: list[tuple[str, str]], length: int
) -> None:
    captions, tokenizer = both(learned, length)
    text = "".join(part + gap for part, gap in parts)[:MOST_LETTERS]
    found, whole = captions.tokens(text), tokenizer.encode(text)
    assert found.numbers.tolist() == whole.ids
    assert found.is_real.tolist() == list(map(bool, whole.attention_mask))
    assert found.is_cut == bool(whole.overflowing)


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_a_word_that_goes_on_behind_what_is_read_first_is_not_taken_to_pieces(
    learned: Path, length: int
) -> None:
    """The tokenizer takes one of 100 letters or more for unknown, and what is left of it would be letters."""
    captions, tokenizer = both(learned, length)
    text = " " * (LETTERS * length - 50) + "ant" * 200
    assert captions.tokens(text).numbers.tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize("piece", ["'ll", "<mask>"])
def test_what_is_one_token_only_as_a_whole_is_not_taken_to_pieces_at_the_edge(
    tmp_path: Path, piece: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<unk>", "a", "red", "sun", "'", "<", "'ll")
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"'ll|\p{L}+|[^\s\p{L}]"), "removed", invert=True)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>")
    made.save_pretrained(tmp_path / "words")
    captions, whole = both(tmp_path / "words", SHORT)
    for before in range(SHORT):
        for letters in range(len(piece)):
            blanks = " " * (LETTERS * SHORT - letters - 2 * before)
            text = "a " * before + blanks + piece + " red sun"
            assert captions.tokens(text).numbers.tolist() == whole.encode(text).ids


@pytest.mark.parametrize("text", ["a" * 10**7, "a" + " " * 10**7 + "red", "\0" * 10**7, "e\u0301" * 10**6])
def test_a_caption_of_megabytes_is_read_as_far_as_the_bound_and_counts_as_cut(
    tmp_path: Path, text: str
) -> None:
    captions = Captions(write_tokenizer(tmp_path / "words"), LONG)
    began = time.process_time()
    found = captions.tokens(text)
    assert time.process_time() - began < 2  # the whole takes up to a minute
    assert found.is_cut and found.numbers.tolist() == captions.tokens(text[:MOST_LETTERS]).numbers.tolist()


@pytest.mark.parametrize("times", [1, 500])
def test_words_behind_the_cut_are_not_read(tmp_path: Path, times: int) -> None:
    captions, tokenizer = both(write_tokenizer(tmp_path / "words"), LONG)
    words = "a green bird in the old tree beside a river of stones and nothing else " * 40
    whole = tokenizer.encode(words)
    for text in (words * times, " " * 5000 + words * times):
        began = time.process_time()
        found = captions.tokens(text)
        assert time.process_time() - began < 0.5
        assert found.is_cut and found.numbers.tolist() == whole.ids


def test_blanks_behind_a_caption_are_no_more_of_it(tmp_path: Path) -> None:
    captions = Captions(write_tokenizer(tmp_path / "words"), LONG)
    found = captions.tokens("a red ant" + "\n" * 10**6)
    assert not found.is_cut and found.numbers.tolist() == captions.tokens("a red ant").numbers.tolist()


@pytest.mark.parametrize("nothing", ["\0\0", " \n", "\ufeff", "\u200b\x07 "])
def test_a_caption_that_shows_nothing_is_none(nothing: str) -> None:
    told = json.dumps({"captions": [nothing, "a red ant"]}).encode()
    assert captions_of({"json": told, "txt": b"the sun"}) == ["a red ant"]
    alone = json.dumps({"captions": [nothing]}).encode()
    assert captions_of({"json": alone, "txt": b"the sun"}) == ["the sun"]
    with pytest.raises(BadSample, match=r"neither a \.txt nor captions") as caught:
        captions_of({"json": alone, "txt": nothing.encode()})
    assert caught.value.reason == "no_caption" and plain(nothing) == ""

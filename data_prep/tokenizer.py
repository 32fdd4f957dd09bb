"""Which words does a data set use? A WordPiece tokenizer learned from its captions, as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.files import fsync_folder, write_atomic
from data_prep.places import TEMPORARY, Place, place_of
from data_prep.schema import TOKENIZER_FOLDER

SPECIAL_TOKENS = {  # role in Hugging Face -> token, in the order of their numbers
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MAX_LENGTH = 512  # tokens, BERT's
MAX_CAPTIONS = (
    1_000_000  # to learn from: more do not fit in memory, and change a vocabulary of thousands little
)
MOST_LETTERS = 2**16  # of a caption that are read at all, also by training
MOST_OF_WORD = 1000  # letters that are learned from: the tokenizer takes words of more than 100 for unknown


def train_tokenizer(folder: Place | Path, shards: Sequence[str], vocab_size: int) -> None:
    """Write `folder`/tokenizer, learned from the captions of the named shards; the same captions give the same bytes.

    At most the first MAX_CAPTIONS of them are read, MOST_LETTERS of each, and of a word the first MOST_OF_WORD: every
    merge goes through all letters of a word that has it, which takes minutes where one has megabytes. Words are
    lower-cased, at most `vocab_size` pieces; `transformers.AutoTokenizer.from_pretrained` loads the folder.
    """
    place = place_of(folder)
    tokenizer = _bare_tokenizer()
    captions = [_bounded(tokenizer, caption) for caption in islice(_captions(place, shards), MAX_CAPTIONS)]
    letters, continuations = _alphabet(tokenizer, captions, vocab_size // 4)
    # The library numbers continuations in the order of a hash map that differs in every process, and breaks ties
    # between merges by these numbers; as "special" tokens they come first, in our order.
    fixed = [*SPECIAL_TOKENS.values(), *continuations]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    tokenizer = _bare_tokenizer(dict(vocabulary))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    first, last = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    config = {
        **SPECIAL_TOKENS,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "clean_up_tokenization_spaces": False,
    }
    _write_folder(
        place,
        {
            "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
            "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
            "special_tokens_map.json": json.dumps(SPECIAL_TOKENS, indent=1) + "\n",
            "vocab.txt": "".join(f"{word}\n" for word, _ in vocabulary),
        },
    )


def _bare_tokenizer(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    model = models.WordPiece(vocabulary or {}, unk_token=SPECIAL_TOKENS["unk_token"])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _bounded(tokenizer: Tokenizer, caption: str) -> str:
    """The caption as it is, unless it or a word of it is too long: then what is learned of it."""
    if len(caption) <= MOST_OF_WORD:
        return caption
    caption = caption[:MOST_LETTERS]
    words = _words(tokenizer, caption)
    if max(map(len, words), default=0) <= MOST_OF_WORD:
        return caption
    return " ".join(word[:MOST_OF_WORD] for word in words)


def _alphabet(tokenizer: Tokenizer, captions: Sequence[str], limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent letters, and those of them that go on inside a word as "##x"; both sorted."""
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(_words(tokenizer, caption))
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    kept = {letter for letter, _ in sorted(letters.items(), key=lambda entry: (-entry[1], entry[0]))[:limit]}
    inside = {letter for word in words for letter in word[1:]} & kept
    return sorted(kept), [f"##{letter}" for letter in sorted(inside)]


def _words(tokenizer: Tokenizer, caption: str) -> list[str]:
    text = tokenizer.normalizer.normalize_str(caption)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def copy_tokenizer(source: Place | Path, folder: Place | Path) -> None:
    """Give the data set in `folder` the tokenizer of the data set in `source`; FileNotFoundError when it has none."""
    there = place_of(source).child(TOKENIZER_FOLDER)
    names = there.names()
    if not names:
        raise FileNotFoundError(
            f"{there} is missing: {source} has no captions, build the split with captions first"
        )
    _write_folder(place_of(folder), {name: there.read(name).decode() for name in names})


def _captions(place: Place, shards: Sequence[str]) -> Iterator[str]:
    for name in shards:
        with place.open(name) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield from json.load(tar.extractfile(member))["captions"]


def _write_folder(place: Place, files: dict[str, str]) -> None:
    """All files; on disk all or none, by a rename. Behind a URL the manifest says when all are there."""
    if place.local is None:
        for name, text in files.items():
            place.write(f"{TOKENIZER_FOLDER}/{name}", text.encode("utf-8"))
        return
    folder = place.local / TOKENIZER_FOLDER
    temporary = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, text in files.items():
        write_atomic(temporary / name, text.encode("utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)

"""Which tokens does a sample's caption become?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from data_prep.tokenizer import MOST_LETTERS
from pretrain.data.faults import BadSample

LETTERS = 64  # of a caption that are read at first for each token that is wanted, a word or two dozen
# Behind a token, without blanks, that may decide how far it goes: "'l" may be a part of "'ll".
MORE_LETTERS = 8


class Tokens(NamedTuple):
    """One caption."""

    numbers: Int[Tensor, " length"]
    is_real: Bool[Tensor, " length"]  # False on padding
    is_cut: bool  # it had more


class Captions:
    """Tokens of captions at a fixed length, by a Hugging Face tokenizer folder; nothing is fetched.

    Raises FileNotFoundError without the folder and ValueError when it holds no usable tokenizer.
    """

    def __init__(self, folder: Path, length: int) -> None:
        self._tokenizer, self.padding = _load(folder)  # number of the padding token
        # Of everything that decides the token numbers; the length is a field of the recipe.
        self.sha256 = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()
        self.length = length  # tokens; longer captions are cut, shorter ones padded
        self._tokenizer.enable_truncation(length)
        padding_token = self._tokenizer.id_to_token(self.padding)
        self._tokenizer.enable_padding(length=length, pad_id=self.padding, pad_token=padding_token)
        self.vocab_size = self._tokenizer.get_vocab_size()
        names = (token.content for token in self._tokenizer.get_added_tokens_decoder().values())
        # "<mask>" is no word before its end.
        self._looks_ahead = max(map(len, names), default=0) + MORE_LETTERS

    def encode(self, caption: str) -> tuple[Int[Tensor, " length"], Bool[Tensor, " length"]]:
        """Token numbers and which of them are real; special tokens included."""
        numbers, is_real, _ = self.tokens(caption)
        return numbers, is_real

    def tokens(self, caption: str) -> Tokens:
        """The same, and whether the caption is longer. At most MOST_LETTERS letters of it are read (or LETTERS a
        token, where those are more), since a text of megabytes would take a minute and most of a gigabyte; the rest
        counts as cut, however few tokens those letters give. Of fewer, as many as it takes for the tokens of the
        whole."""
        reach = LETTERS * self.length
        most = min(max(MOST_LETTERS, reach), len(caption))
        encoding = self._tokenizer.encode(caption[:reach])
        while reach < most and not self._is_of_whole(encoding, caption[:reach]):  # blanks, or long words
            reach = min(2 * reach, most)
            encoding = self._tokenizer.encode(caption[:reach])
        is_cut = bool(encoding.overflowing) or len(caption.rstrip()) > reach
        mask = torch.tensor(encoding.attention_mask, dtype=torch.bool)
        return Tokens(torch.tensor(encoding.ids), mask, is_cut)

    def _is_of_whole(self, encoding: Encoding, beginning: str) -> bool:
        """Whether any text that begins so has these tokens: neither the last word, which may go on, nor the last
        letters, which may be taken together otherwise then, give any that is kept."""
        if not encoding.overflowing or _last_word(encoding.overflowing[-1]) == _last_word(encoding):
            return False
        end = max(end for _, end in encoding.offsets)
        return len(beginning[end:].strip()) >= self._looks_ahead


def _last_word(encoding: Encoding) -> int:
    """Its number in the text; special tokens are of none."""
    return max((word for word in encoding.word_ids if word is not None), default=-1)


def captions_of(members: Mapping[str, bytes]) -> list[str]:
    """The captions of a sample: those in its .json, else the .txt. One that shows nothing, such as control characters
    alone, is none, as when data sets are built; it is judged by its first MOST_LETTERS letters.

    Raises BadSample: `broken_text` (no UTF-8, no JSON) or `no_caption`.
    """
    try:
        record = json.loads(members["json"]) if "json" in members else {}
        told = record.get("captions", []) if isinstance(record, dict) else None
        if not isinstance(told, list) or not all(isinstance(caption, str) for caption in told):
            raise ValueError(f"captions={told!r} in the .json must be a list of texts")
        captions = [caption for caption in told if _shows(caption)]
        for caption in captions:
            caption.encode()  # half of a pair of surrogates is no text
        text = members.get("txt", b"").decode("utf-8").strip()
    except (ValueError, RecursionError) as error:  # Unicode's errors are ValueErrors
        raise BadSample("broken_text", f"caption: {error}") from error
    captions = captions or ([text] if _shows(text) else [])
    if not captions:
        raise BadSample("no_caption", "the sample has neither a .txt nor captions in its .json")
    return captions


def _shows(caption: str) -> bool:
    return any(char.isprintable() and not char.isspace() for char in caption[:MOST_LETTERS])


def _load(folder: Path) -> tuple[Tokenizer, int]:
    """The fast tokenizer of a folder in any layout that transformers knows, and its padding number."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder, a text source needs a tokenizer: build the data set with captions, "
            "which writes tokenizer/ beside its shards, or name a Hugging Face tokenizer folder by --tokenizer"
        )
    from transformers import AutoTokenizer  # takes seconds; runs without text and workers do not pay them

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(
            f"{folder} holds no Hugging Face tokenizer: {error!r}; name another folder"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # made of a model's config.json alone
        raise ValueError(
            f"{folder} holds no Hugging Face tokenizer: its {len(tokenizer)} tokens are all special, so no word is "
            "known; save the tokenizer there (tokenizer.json), or name another folder"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no padding token: add one (`pad_token`) to it")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} has no tokenizer.json: save it as a fast tokenizer")
    return tokenizer.backend_tokenizer, tokenizer.pad_token_id

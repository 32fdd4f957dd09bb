"""What must the model know of data and guide? Read at the start, kept in every checkpoint; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain import written


@dataclass(frozen=True)
class DataFacts:
    """Names of labels and sizes of what others made, and by which bytes it is known again."""

    categories: tuple[str, ...]  # names by index; empty without category supervision
    vocab_size: int  # of the tokenizer; 0 without text supervision
    tags: tuple[str, ...] = ()  # names by number; empty without tags supervision
    guide_width: int = 0  # of the features of the frozen encoder that targets need; 0 without
    guide_codes: int = 0  # of its codebook; 0 where it is no tokenizer
    sha256: dict[str, str] = field(default_factory=dict)  # of "data.NAME", "tokenizer", "guide", "init"
    num_samples: dict[str, int] = field(default_factory=dict)  # by source; empty in checkpoints of before

    def to_json(self) -> str:
        """The facts as text, from which `from_json` makes equal ones."""
        return written.to_json(self)

    @staticmethod
    def from_json(text: str) -> DataFacts:
        """ValueError that names what does not fit or is not known."""
        return written.from_json(DataFacts, text)

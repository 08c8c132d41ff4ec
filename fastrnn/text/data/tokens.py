"""Text to token ids and back, at character, word or BPE level, over Hugging Face `tokenizers`.

A `Vocabulary` is one `tokenizers.Tokenizer`, saved as its JSON text, so a checkpoint holds it whole.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ..errors import UserError
from .segment import Segmenter

UNKNOWN, END = "<unk>", "<eos>"
DEFAULT_SIZE = {"char": None, "word": 10_000, "bpe": 4_000}
CHUNK = 1 << 14  # characters per piece given to the tokenizer: bounds its memory, which is ~100 bytes a character


class Vocabulary:
    """Tokens of one level. `len(v)` counts them; ids are 0 .. len(v) - 1.

    - char: every character is a token.
    - word: what stands between blanks is a token, a line's end is `<eos>` (the Penn Treebank convention).
    - bpe: pieces of UTF-8 bytes; every text can be encoded.
    At the levels char and word, what the training text lacks becomes `<unk>`.
    """

    def __init__(self, tokenizer: Tokenizer, level: str, segmenter: Segmenter | None = None) -> None:
        self.tokenizer = tokenizer
        self.level = level
        self.segmenter = segmenter or Segmenter()
        self.unknown: int | None = tokenizer.token_to_id(UNKNOWN)

    @classmethod
    def build(cls, text: str, level: str, size: int | None = None, segmenter: Segmenter | None = None) -> Vocabulary:
        """The vocabulary of `text`: its `size` most frequent tokens, ties in the order of the alphabet.

        `segmenter` makes the words of every line first.
        """
        if level == "bpe":
            return cls.train([text], size, segmenter)
        return cls.from_counts(cls.count(text, level, segmenter), level, size, segmenter)

    @staticmethod
    def count(text: str, level: str, segmenter: Segmenter | None = None) -> Counter[str]:
        """How often each token of a level other than bpe occurs; counts of parts may be added."""
        text = segment_lines(text, segmenter)
        return Counter(text) if level == "char" else count_words(text)

    @classmethod
    def from_counts(
        cls, counts: Counter[str], level: str, size: int | None = None, segmenter: Segmenter | None = None
    ) -> Vocabulary:
        """The vocabulary of the `size` most frequent of counted tokens."""
        if level not in DEFAULT_SIZE:
            raise UserError(f"--level must be one of {', '.join(DEFAULT_SIZE)}, got {level}")
        size = size or DEFAULT_SIZE[level]
        reserved = [UNKNOWN] if level == "char" else [UNKNOWN, END]
        ranked = sorted((token for token in counts if token not in reserved), key=lambda t: (-counts[t], t))
        kept = reserved + ranked[: None if size is None else max(size - len(reserved), 0)]
        tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(kept)}, unk_token=UNKNOWN))
        if level == "char":
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
            tokenizer.decoder = decoders.Fuse()
        else:
            tokenizer.normalizer = normalizers.Replace("\n", f" {END} ")
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls(tokenizer, level, segmenter)

    @classmethod
    def train(cls, texts: Iterable[str], size: int | None = None, segmenter: Segmenter | None = None) -> Vocabulary:
        """A vocabulary of byte pairs, of the parts of a text."""
        lines = (line for text in texts for line in segment_lines(text, segmenter).splitlines(keepends=True))
        return cls(train_bpe(lines, size or DEFAULT_SIZE["bpe"] or 0), "bpe", segmenter)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Vocabulary:
        return cls(Tokenizer.from_str(state["json"]), state["level"], Segmenter.from_state(state["segmenter"]))

    def state(self) -> dict[str, Any]:
        """What `from_state` rebuilds this vocabulary from; plain data."""
        return {"level": self.level, "json": self.tokenizer.to_str(), "segmenter": self.segmenter.state()}

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> torch.Tensor:
        """The ids of `text`, (N,) int64."""
        pieces = list(self._pieces(segment_lines(text, self.segmenter)))
        ids: list[int] = []
        for start in range(0, len(pieces), 64):
            for encoding in self.tokenizer.encode_batch_fast(pieces[start : start + 64], add_special_tokens=False):
                ids.extend(encoding.ids)
        return torch.tensor(ids, dtype=torch.int64)

    def encode_all(self, texts: Iterable[str]) -> list[torch.Tensor]:
        """The ids of each of `texts`, (N,) int64; a text without a token is one unknown token."""
        found: list[torch.Tensor] = []
        empty = [self.unknown or 0]
        for batch in batched((self.segmenter(text) for text in texts), 256):
            for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                found.append(torch.tensor(encoding.ids or empty, dtype=torch.int64))
        return found

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """The text of `ids`; words stand apart by one blank, `<eos>` ends a line."""
        text = self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        if self.level == "word":
            text = text.replace(f" {END} ", "\n").replace(f" {END}", "\n").replace(f"{END} ", "\n").replace(END, "\n")
        return text

    def start(self) -> int:
        """The id from which a text without a prompt begins: a line's end, where there is one."""
        ids = self.encode("\n").tolist()
        return ids[-1] if ids and ids[-1] != self.unknown else len(self) - 1

    def _pieces(self, text: str) -> Iterator[str]:
        """Cuts `text` at the ends of lines (anywhere for characters, which do not join) into pieces of about CHUNK."""
        at = 0
        while at < len(text):
            end = at + CHUNK
            if self.level != "char" and end < len(text):
                line_end = text.find("\n", end)
                end = len(text) if line_end < 0 else line_end + 1
            yield text[at:end]
            at = end


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def segment_lines(text: str, segmenter: Segmenter | None) -> str:
    if segmenter is None or segmenter == Segmenter():
        return text
    return "\n".join(segmenter(line) for line in text.split("\n"))


def count_words(text: str) -> Counter[str]:
    counts = Counter(text.split())
    counts[END] += text.count("\n")
    return counts


def train_bpe(lines: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE (as in GPT-2): the 256 bytes and the `size` - 256 most useful merges."""
    if size < 257:
        raise UserError(f"--vocab-size must be at least 257 at level bpe (256 bytes and one merge), got {size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer

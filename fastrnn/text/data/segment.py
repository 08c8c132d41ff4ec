"""Text to words: what stands between blanks, or words and signs apart, or Chinese words; lower case, stop words, stems.

A `Segmenter` gives text with one blank between words, which the vocabulary's word level then reads.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from pathlib import Path
from typing import Any

from ..errors import UserError

WORDS = ("blanks", "split", "jieba")
TOKEN = re.compile(r"<\w+>|\w+(?:['\u2019]\w+)*|[^\w\s]")  # <unk>, don't, a sign
CJK = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
ENGLISH = """
    a about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing down during each few for from further had has have having he her here hers him his how i
    if in into is it its itself just me more most my myself now of off on once only or other our ours out over own same
    she should so some such t than that the their theirs them themselves then there these they this those through to too
    under until up very was we were what when where which while who whom why will with would you your yours
"""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """Callable: text to words with one blank between them. `stop_words` are left out, `stem` is a Snowball language."""

    words: str = "blanks"
    lower: bool = False
    stop_words: tuple[str, ...] = ()
    stem: str | None = None

    def __call__(self, text: str) -> str:
        if self.lower:
            text = text.lower()
        if self.words == "blanks" and not self.stop_words and self.stem is None:
            return text  # as it stands, lines included
        words = split_words(text, self.words)
        if self.stop_words:
            dropped = stop_set(self.stop_words)
            words = [word for word in words if word.lower() not in dropped]
        if self.stem is not None:
            words = stemmer(self.stem).stemWords(words)
        return " ".join(words)

    def join(self, text: str) -> str:
        """`text` as people write it: signs beside their words, no blanks between Chinese characters."""
        if self.words == "jieba":
            text = re.sub(rf"(?<=[{CJK}]) (?=\S)|(?<=\S) (?=[{CJK}])", "", text)
        if self.words != "blanks":
            text = re.sub(r" (?=[,.!?;:%)\]}…])", "", text)
            text = re.sub(r"(?<=[(\[{]) ", "", text)
        return text

    def state(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "stop_words": list(self.stop_words)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Segmenter:
        return cls(**{**state, "stop_words": tuple(state["stop_words"])})

    @classmethod
    def from_options(cls, config: Any) -> Segmenter:
        """From the options --words, --lower, --stop-words (english or a file, one word a line) and --stem."""
        stop = config.stop_words
        if stop is None:
            found: tuple[str, ...] = ()
        elif stop == "english":
            found = tuple(sorted(set(ENGLISH.split())))
        else:
            from .files import read_text

            if not Path(stop).exists():
                raise UserError(f"--stop-words {stop}: neither 'english' nor a file")
            found = tuple(sorted({word.lower() for word in read_text(Path(stop)).split()}))
        if config.stem is not None:
            stemmer(config.stem)
        return cls(config.words, config.lower, found, config.stem)


def split_words(text: str, words: str) -> list[str]:
    if words == "jieba":
        return [word for word in jieba().lcut(text) if not word.isspace()]
    return text.split() if words == "blanks" else TOKEN.findall(text)


@functools.cache
def stop_set(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(words)


@functools.cache
def stemmer(language: str) -> Any:
    import snowballstemmer

    known = snowballstemmer.algorithms()
    if language not in known:
        raise UserError(f"--stem {language}: there are: {', '.join(sorted(known))}")
    return snowballstemmer.stemmer(language)


@functools.cache
def jieba() -> Any:
    import logging

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own source text and of pkg_resources
            import jieba as module
    except ModuleNotFoundError:
        raise UserError("Chinese words need jieba: pip install 'fastrnn[zh]', or --level char or bpe") from None
    module.setLogLevel(logging.WARNING)
    return module

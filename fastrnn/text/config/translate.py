"""The options of a translator."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import UserError
from .run import RunConfig, at_least, below, option

Level = Literal["word", "char", "bpe"]
Words = Literal["split", "blanks", "jieba"]


@dataclasses.dataclass
class TranslateConfig(RunConfig):
    """An encoder and a decoder with attention, from any text to any other."""

    lr: float = option(0.002, "learning rate at its highest")
    epochs: int = option(8, "passes over the training data (stretches the cosine schedule)", free=True)
    data: str | None = option(
        None,
        "folder of parallel files SPLIT.LANGUAGE (one sentence a line, .gz too), or .tsv of pairs, or a folder of "
        "those, or hf:NAME[:CONFIG] of the Hugging Face hub; by default dates as people write them, to ISO dates",
        free=True,
    )
    source: str | None = option(
        None, "parallel files: the language (suffix) to translate from; hub data sets: the column or language"
    )
    target: str | None = option(
        None, "parallel files: the language (suffix) to translate to; hub data sets: the column or language"
    )
    source_column: int = option(1, "tables: the column to translate from")
    target_column: int = option(2, "tables: the column to translate to")
    held_out: float = option(0.05, "share of the pairs for each of validation and test, where the data has none")
    level: Level | None = option(None, "what a token is on both sides; by default word, and char for the dates")
    source_level: Level | None = option(None, "what a token is of the source, where it is not --level")
    target_level: Level | None = option(None, "what a token is of the target, where it is not --level")
    words: Words = option("split", "words: split from signs; between blanks; Chinese")
    source_words: Words | None = option(None, "words of the source, where they are not --words")
    target_words: Words | None = option(None, "words of the target, where they are not --words")
    lower: bool = option(False, "lower-case both sides, and references for BLEU")
    vocab_size: int | None = option(10_000, "largest vocabulary of each side (characters: all)")
    max_length: int = option(80, "longest side of a training pair, in tokens; 0: any")
    too_long: Literal["drop", "refuse"] = option("drop", "what becomes of longer ones; the number dropped is reported")
    cell: Literal["lstm", "gru", "rnn"] = option("lstm", "recurrent cell")
    layer: Literal["fastrnn", "torch"] = option("fastrnn", "whose recurrent layers: fastrnn's or torch.nn's", free=True)
    attention: Literal["bahdanau", "luong"] = option("luong", "bahdanau: by the state before; luong: by that after")
    emb_size: int = option(128, "size of an embedding")
    hidden_size: int = option(256, "units of the decoder; half of them in each direction of the encoder")
    layers: int = option(1, "recurrent layers on either side")
    dropout: float = option(0.3, "dropout on embeddings, between layers and on outputs")
    label_smoothing: float = option(0.0, "share of each target spread over all tokens, in training")
    batch_size: int = option(64, "pairs of a step, over all processes")
    beam: int = option(5, "hypotheses of beam search at the end; 1: the likeliest token each time", free=True)
    length_penalty: float = option(1.0, "exponent of the length by which hypotheses' scores are divided", free=True)
    score_pairs: int = option(0, "validation and test pairs translated for BLEU at the end; 0: all", free=True)
    bleu_every: int = option(
        0, "epochs between BLEU scores of the validation pairs (as many as at the end), in training; 0: none", free=True
    )
    examples: int = option(10, "translations shown and drawn (three) at the end", free=True)
    compare: int = option(5, "steps timed with each layer, fastrnn and torch.nn, at the end; 0: none", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "emb_size", "layers", "batch_size", "beam", "source_column", "target_column")
        at_least(self, 2, "hidden_size")
        at_least(self, 0, "compare", "max_length", "length_penalty", "score_pairs", "bleu_every", "examples")
        below(self, 1, "dropout", "label_smoothing")
        if not 0 < self.held_out < 0.5:
            raise UserError(f"--held-out must lie in (0, 0.5), got {self.held_out}")
        if self.hidden_size % 2:
            raise UserError(f"--hidden-size must be even, half for each direction, got {self.hidden_size}")
        if self.batch_size < self.world:
            raise UserError(f"--batch-size {self.batch_size} must be at least the {self.world} processes")
        if self.bleu_every and self.strategy == "fsdp":
            raise UserError("--bleu-every needs the whole model in each process, so not --strategy fsdp")
        if (self.source is None) != (self.target is None):
            raise UserError(
                "--source and --target go together: suffixes of parallel files, or columns of a hub data set"
            )

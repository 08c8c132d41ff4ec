"""The options of a classifier."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import UserError
from .run import RunConfig, at_least, below, option


@dataclasses.dataclass
class ClassifyConfig(RunConfig):
    """A recurrent classifier (or regressor) of texts or of real-valued sequences."""

    lr: float = option(0.002, "learning rate at its highest")
    epochs: int = option(5, "passes over the training data (stretches the cosine schedule)", free=True)
    data: str | None = option(
        None,
        "folder or tar archive of SPLIT/LABEL/*.txt, or .csv, .tsv, .jsonl with text and label columns, or a folder of "
        "such tables, or hf:NAME[:CONFIG] of the Hugging Face hub; by default docstrings of Python's library, by "
        "package",
        free=True,
    )
    text_column: str | None = option(None, "column of the text in a table; found by its usual names")
    label_column: str | None = option(None, "column of the label in a table; found by its usual names")
    valid_share: float = option(0.1, "share of the training examples held out where there is no validation split")
    input: Literal["text", "series"] = option("text", "series: real-valued sequences, .npy or .csv")
    target: Literal["class", "number"] = option("class", "number: regression, by the mean squared error")
    level: Literal["word", "char", "bpe"] = option("word", "what a token is")
    vocab_size: int | None = option(25_000, "largest vocabulary")
    words: Literal["split", "blanks", "jieba"] = option("split", "words: split from signs; between blanks; Chinese")
    lower: bool = option(True, "lower-case the text")
    stop_words: str | None = option(None, "leave out the words of 'english' or of a file")
    stem: str | None = option(None, "stem words: english, german, ... (Snowball)")
    max_length: int = option(400, "longest sequence, in tokens or steps; 0: any")
    too_long: Literal["cut", "refuse"] = option("cut", "what becomes of longer ones; the number cut is reported")
    cell: Literal["lstm", "gru", "rnn"] = option("lstm", "recurrent cell")
    layer: Literal["fastrnn", "torch"] = option("fastrnn", "whose recurrent layers: fastrnn's or torch.nn's", free=True)
    emb_size: int = option(100, "size of an embedding")
    hidden_size: int = option(128, "units of a recurrent layer, in each direction")
    layers: int = option(1, "recurrent layers")
    bidirectional: bool = option(True, "run both ways")
    pooling: Literal["last", "mean", "max", "attention", "concat"] = option(
        "max", "what is made of the outputs of all steps; concat: last, max and mean"
    )
    batches: Literal["lengths", "packed"] = option("lengths", "how ragged batches reach the layer; torch.nn: packed")
    dropout: float = option(0.3, "dropout on embeddings, between layers and on what was pooled")
    batch_size: int = option(32, "examples of a step, over all processes")
    pretrained: str | None = option(
        None, "checkpoint of a language model to start from; its vocabulary, words and network become the classifier's"
    )
    unfreeze: int = option(1, "pretrained: epochs until one more layer is trained, output first; 0: all at once")
    layer_decay: float = option(2.6, "pretrained: factor by which the learning rate falls from a layer to that below")
    compare: int = option(15, "steps timed with each layer, fastrnn and torch.nn, at the end; 0: none", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "emb_size", "hidden_size", "layers", "batch_size")
        at_least(self, 0, "compare", "max_length", "unfreeze")
        at_least(self, 1, "layer_decay")
        below(self, 1, "dropout")
        if not 0 < self.valid_share < 1:
            raise UserError(f"--valid-share must lie in (0, 1), got {self.valid_share}")
        if self.vocab_size is not None and self.vocab_size < 3:
            raise UserError(f"--vocab-size must be at least 3, got {self.vocab_size}")
        if self.batch_size < self.world:
            raise UserError(f"--batch-size {self.batch_size} must be at least the {self.world} processes")

"""The options of a language model."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import UserError
from .run import RunConfig, at_least, below, option


@dataclasses.dataclass
class LmConfig(RunConfig):
    """A recurrent language model: text, vocabulary, network, and how the text is cut into batches."""

    data: str | None = option(
        None,
        "text file, folder, tar archive, or hf:NAME[:CONFIG] of the Hugging Face hub; by default the language "
        "reference that Python carries",
        free=True,
    )
    text_column: str | None = option(None, "hub data sets: column of the text; found by its usual names")
    level: Literal["char", "word", "bpe"] = option("char", "what a token is; word: what stands between blanks")
    words: Literal["blanks", "split", "jieba"] = option("blanks", "words: between blanks; split from signs; Chinese")
    lower: bool = option(False, "lower-case the text")
    vocab_size: int | None = option(None, "largest vocabulary; by default all characters, 10000 words, 4000 pieces")
    cell: Literal["lstm", "gru", "rnn"] = option("lstm", "recurrent cell")
    layer: Literal["fastrnn", "torch"] = option("fastrnn", "whose recurrent layers: fastrnn's or torch.nn's", free=True)
    emb_size: int = option(64, "size of an embedding")
    hidden_size: int = option(256, "units of a recurrent layer")
    layers: int = option(1, "recurrent layers")
    dropout: float = option(0.1, "dropout on embeddings, between layers and on outputs")
    variational: bool = option(False, "dropout with one mask for all steps of a window")
    dropout_in: float | None = option(None, "dropout on embeddings, where it is not --dropout")
    dropout_hidden: float | None = option(None, "dropout between layers, where it is not --dropout (--variational)")
    dropout_emb: float = option(0.0, "dropout of whole words from the embedding")
    weight_drop: float = option(0.0, "dropout on recurrent weights")
    alpha: float = option(0.0, "AR: penalty on the mean square of outputs")
    beta: float = option(0.0, "TAR: penalty on the mean square of the outputs' change from step to step")
    tied: bool = option(False, "share the embedding with the output layer; last layer and embedding have one size")
    cutoffs: list[int] | None = option(None, "adaptive softmax: clusters of rarer tokens begin at [2000,10000]")
    init_range: float = option(0.0, "draw all weights from U(-a, a); 0: PyTorch's initialisation")
    batch_size: int = option(16, "columns that the text is cut into, over all processes")
    bptt: int = option(64, "steps of truncated back-propagation")
    varied_bptt: bool = option(False, "windows of random length around --bptt; the learning rate goes with it")
    eval_batch_size: int = option(
        10, "columns at validation; the published Penn Treebank figures use 1 at the end", free=True
    )
    sample: int = option(400, "tokens of the sample written at the end; 0: none", free=True)
    compare: int = option(15, "steps timed with each layer, fastrnn and torch.nn, at the end; 0: none", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "emb_size", "hidden_size", "layers", "batch_size", "bptt", "eval_batch_size")
        at_least(self, 0, "init_range", "sample", "compare", "alpha", "beta")
        below(self, 1, "dropout", "dropout_emb", "weight_drop")
        below(self, 1, *(name for name in ("dropout_in", "dropout_hidden") if getattr(self, name) is not None))
        if self.vocab_size is not None and self.vocab_size < 2:
            raise UserError(f"--vocab-size must be at least 2, got {self.vocab_size}")
        if self.tied and not self.stacked and self.emb_size != self.hidden_size:
            raise UserError(f"--tied needs --emb-size ({self.emb_size}) equal to --hidden-size ({self.hidden_size})")
        if self.tied and self.cutoffs is not None:
            raise UserError("--tied and --cutoffs exclude each other: an adaptive softmax has no weight to share")
        if self.varied_bptt and self.bptt < 10:
            raise UserError(f"--varied-bptt needs --bptt of at least 10, got {self.bptt}")
        cutoffs = self.cutoffs
        if cutoffs is not None and (not cutoffs or cutoffs != sorted(set(cutoffs)) or cutoffs[0] < 1):
            raise UserError(f"--cutoffs must be rising positive numbers, got {cutoffs}")
        if cutoffs is not None and self.last_size < 4 ** len(cutoffs):  # each cluster has a quarter of the size before
            raise UserError(f"--cutoffs with {len(cutoffs)} numbers needs --hidden-size of {4 ** len(cutoffs)} or more")
        if self.batch_size % self.world:
            raise UserError(f"--batch-size {self.batch_size} must be a multiple of the {self.world} processes")

    @property
    def stacked(self) -> bool:
        """Whether the layers are modules of their own."""
        return self.variational or self.weight_drop > 0

    @property
    def last_size(self) -> int:
        """Units of the last layer: the embedding's size where that is shared."""
        return self.emb_size if self.tied else self.hidden_size

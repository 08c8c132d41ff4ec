"""What can be set for a run: plain dataclasses, one field per command-line option, checked on construction.

`RunConfig` holds what every task shares (optimiser, schedule, saving); a task derives from it and adds its model
and data. The command line and YAML files are made from the same fields, so an option is written once, here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from .errors import UserError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the text that `--help` shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class RunConfig:
    """What every training task shares."""

    optimizer: Literal["sgd", "adam", "adamw"] = option("adamw", "optimiser")
    lr: float = option(0.004, "learning rate at its highest")
    weight_decay: float = option(0.0, "weight decay")
    clip: float = option(1.0, "largest gradient norm; 0 switches clipping off")
    epochs: int = option(6, "passes over the training text")
    max_steps: int = option(-1, "stop after so many steps; -1: no limit")
    schedule: Literal["constant", "cosine", "step", "plateau"] = option(
        "cosine",
        "constant; cosine: down to a twentieth over the run; step: times --decay each epoch after --decay-start; "
        "plateau: times --decay when the validation loss does not fall",
    )
    warmup: int = option(0, "steps over which the learning rate rises from 0")
    decay: float = option(0.5, "factor of the schedules step and plateau")
    decay_start: int = option(4, "schedule step: epochs at the full rate")
    seed: int = option(1, "seed of weights, dropout and samples")
    threads: int = option(0, "CPU threads; 0: torch's choice")
    device: str = option("auto", "auto, cpu, cuda or mps")
    out: str | None = option(None, "folder of the run; the first free of runs/TASK-001, -002, ... by default")
    save_every: int = option(500, "steps between checkpoints within an epoch; 0: at the ends of epochs only")
    log_every: int = option(50, "steps between rows of the metrics file")
    progress: bool | None = option(None, "progress bar; by default where the output is a terminal")

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "log_every")
        at_least(self, 0, "weight_decay", "clip", "warmup", "decay_start", "threads", "save_every", "seed")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be a positive number, got {self.lr}")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay must lie in (0, 1], got {self.decay}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max-steps must be at least 1, or -1 for no limit, got {self.max_steps}")


@dataclasses.dataclass
class LmConfig(RunConfig):
    """A recurrent language model: text, vocabulary, network, and how the text is cut into batches."""

    data: str | None = option(None, "text file or folder; by default the language reference that Python carries")
    level: Literal["char", "word", "bpe"] = option("char", "what a token is; word: what stands between blanks")
    vocab_size: int | None = option(None, "largest vocabulary; by default all characters, 10000 words, 4000 pieces")
    cell: Literal["lstm", "gru", "rnn"] = option("lstm", "recurrent cell")
    layer: Literal["fastrnn", "torch"] = option("fastrnn", "whose recurrent layers: fastrnn's or torch.nn's")
    emb_size: int = option(64, "size of an embedding")
    hidden_size: int = option(256, "units of a recurrent layer")
    layers: int = option(1, "recurrent layers")
    dropout: float = option(0.1, "dropout on embeddings, between layers and on outputs")
    tied: bool = option(False, "share the embedding with the output layer (needs --emb-size equal to --hidden-size)")
    init_range: float = option(0.0, "draw all weights from U(-a, a); 0: PyTorch's initialisation")
    batch_size: int = option(16, "columns that the text is cut into")
    bptt: int = option(64, "steps of truncated back-propagation")
    eval_batch_size: int = option(10, "columns at validation; the published Penn Treebank figures use 1 at the end")
    sample: int = option(400, "tokens of the sample written at the end; 0: none")
    compare: int = option(15, "steps timed with each layer, fastrnn and torch.nn, at the end; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "emb_size", "hidden_size", "layers", "batch_size", "bptt", "eval_batch_size")
        at_least(self, 0, "init_range", "sample", "compare")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must lie in [0, 1), got {self.dropout}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise UserError(f"--vocab-size must be at least 2, got {self.vocab_size}")
        if self.tied and self.emb_size != self.hidden_size:
            raise UserError(f"--tied needs --emb-size ({self.emb_size}) equal to --hidden-size ({self.hidden_size})")


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises UserError if a named field of `config` is below `least` or not finite."""
    for name in names:
        value = getattr(config, name)
        if not least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


# What may change when a run is continued: nothing that makes another model or another order of its data. (--epochs
# stretches the cosine schedule; --layer, --threads and --device may change the last bits.)
FREE_ON_RESUME = frozenset({"epochs", "max_steps", "out", "data", "threads", "device", "save_every", "log_every",
                            "progress", "layer", "sample", "compare", "eval_batch_size"})  # fmt: skip


def resumed(saved: Any, given: dict[str, Any]) -> Any:
    """The configuration of a continued run: the `saved` one with what the user `given` again.

    Raises UserError if an option outside FREE_ON_RESUME differs from the saved run.
    """
    for name, value in given.items():
        if name not in FREE_ON_RESUME and getattr(saved, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value} differs from the {getattr(saved, name)} of the run to be resumed"
            )
    return dataclasses.replace(saved, **given)

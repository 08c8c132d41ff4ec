"""The language-model task: truncated back-propagation with a carried state; perplexity; the run from end to end."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from .. import checkpoint as checkpoints
from ..compare import compare_layers
from ..config import LmConfig, resumed
from ..data.corpus import Corpus, load_corpus
from ..data.stream import IGNORE, BpttLoader
from ..data.tokens import Vocabulary
from ..errors import UserError
from ..evaluate import Score, evaluate_stream, unigram_perplexity
from ..models.lm import LanguageModel, State, detach, move
from ..runs import BEST, resume_path, run_folder
from ..sampling import generate
from ..training import Task, fit

Echo = Callable[[str], None]


class LmTask(Task):
    """Trains a LanguageModel on windows that follow one another; the state flows from each to the next."""

    name = "lm"
    config: LmConfig

    def __init__(self, config: LmConfig, vocabulary: Vocabulary, data_mark: str, chars_per_token: float) -> None:
        super().__init__(config, data_mark)
        self.vocabulary = vocabulary
        self.chars_per_token = chars_per_token  # of the validation text, for bits per character
        self.model = LanguageModel(config, len(vocabulary))
        self.state: State | None = None
        self.train_sum = [0.0, 0.0]  # loss summed over tokens, tokens
        self.valid_sum = [0.0, 0.0]
        self.valid_state: State | None = None
        self.clock = time.perf_counter()
        self.sitting = 0.0  # tokens trained since `clock`
        self.sitting_seconds = 0.0  # from `clock` to the validation

    def on_train_start(self) -> None:
        super().on_train_start()
        self.state = move(self.state, self.device)  # a checkpoint is read onto the CPU

    def on_train_epoch_start(self) -> None:
        self.state, self.train_sum = None, [0.0, 0.0]
        self.clock, self.sitting = time.perf_counter(), 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        logits, state = self.model(tokens, self.state)
        self.state = detach(state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        value = loss.item()
        self.train_sum[0] += value * targets.numel()
        self.train_sum[1] += targets.numel()
        self.sitting += targets.numel()
        self.log("train_loss", value, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_validation_epoch_start(self) -> None:
        self.valid_state, self.valid_sum = None, [0.0, 0.0]
        self.sitting_seconds = time.perf_counter() - self.clock

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens, targets = batch
        logits, self.valid_state = self.model(tokens, self.valid_state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        self.valid_sum[0] += loss.item()
        self.valid_sum[1] += int((targets != IGNORE).sum())

    def on_validation_epoch_end(self) -> None:
        loss = self.valid_sum[0] / self.valid_sum[1]
        self.log_dict({"valid_loss": loss, "valid_ppl": perplexity(loss)})

    def end_epoch(self) -> dict[str, float]:
        loss = self.valid_sum[0] / self.valid_sum[1]
        return {
            "train_loss": self.train_sum[0] / self.train_sum[1],
            "valid_loss": loss,
            "valid_ppl": perplexity(loss),
            "valid_bits_per_char": loss / math.log(2) / self.chars_per_token,
            "tokens_per_s": self.sitting / self.sitting_seconds,
        }

    def describe_epoch(self, row: dict[str, float]) -> str:
        bits = "" if self.config.level == "word" else f" ({row['valid_bits_per_char']:.3f} bits per character)"
        return (
            f"epoch {row['epoch']:.0f}/{self.trainer.max_epochs}: train ppl {perplexity(row['train_loss']):.2f}, "
            f"valid ppl {row['valid_ppl']:.2f}{bits}, {row['tokens_per_s']:,.0f} tokens/s"
        )

    def vocabulary_state(self) -> dict[str, str]:
        return self.vocabulary.state()

    def extra_state(self) -> dict[str, Any]:
        return {"state": self.state, "train_sum": self.train_sum}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.train_sum = state["train_sum"]
        self.state = state["state"]


def perplexity(loss: float) -> float:
    """exp of the mean loss, in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclasses.dataclass
class LmResult:
    """What a run reached. Perplexities are per token; `history` has one row per epoch."""

    folder: Path
    model: LanguageModel
    vocabulary: Vocabulary
    history: list[dict[str, float]]
    unigram_ppl: float
    valid: Score
    test: Score | None
    seconds: float
    sample: str
    layer_ms: dict[str, float]


def load_model(path: str | Path, layer: str | None = None) -> tuple[LanguageModel, Vocabulary, LmConfig]:
    """The model of a checkpoint, in eval mode on the CPU, its vocabulary and configuration.

    `layer` ("fastrnn" or "torch") overrides whose layers it was trained with. Raises UserError for a bad file.
    """
    return restore(checkpoints.load(path, "lm"), layer)


def restore(checkpoint: dict[str, Any], layer: str | None = None) -> tuple[LanguageModel, Vocabulary, LmConfig]:
    head = checkpoint["fastrnn"]
    config = LmConfig(**head["config"])
    if layer is not None:
        config = LmConfig(**{**head["config"], "layer": layer})
    vocabulary = Vocabulary.from_state(head["tokenizer"])
    model = LanguageModel(config, len(vocabulary))
    weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    model.load_state_dict(weights)
    return model.eval(), vocabulary, config


def train_lm(
    config: LmConfig,
    resume: str | None = None,
    given: dict[str, Any] | None = None,
    overwrite: bool = False,
    echo: Echo = print,
) -> LmResult:
    """Trains a language model as `config` says and returns what it reached; the command `fastrnn train lm`.

    Args:
        config: of the run; when resuming, only what `given` names of it counts.
        resume: a checkpoint or run folder to go on from; "auto" is config.out, from the start if it is empty.
        given: options set explicitly, by field name; when resuming they are compared with the saved run's.
        overwrite: replace a run that lies in config.out.
        echo: gets each line of the report.

    Raises:
        UserError: bad data, options or checkpoint. Interrupted: after a signal, with the checkpoint written.
    """
    start = None if resume is None else resume_path(resume, config.out)
    if resume is not None and start is None:
        echo(f"nothing to resume in {config.out}: starting from the beginning")
    if start is not None:
        head = checkpoints.load(start, "lm")["fastrnn"]
        config = resumed(LmConfig(**head["config"]), given or {})
        vocabulary = Vocabulary.from_state(head["tokenizer"])
    if config.threads:
        torch.set_num_threads(config.threads)
    corpus = load_corpus(config.data)
    if start is None:
        vocabulary = Vocabulary.build(corpus.train, config.level, config.vocab_size)
    ids = {"train": vocabulary.encode(corpus.train), "valid": vocabulary.encode(corpus.valid)}
    train = loader(ids["train"], config.batch_size, config.bptt, "training")
    valid = loader(ids["valid"], config.eval_batch_size, config.bptt, "validation", pad=True)
    mark = f"{len(ids['train'])} tokens, crc32 {zlib.crc32(ids['train'].numpy().tobytes()):08x}"
    if start is not None and head["data"] != mark:
        raise UserError(f"--resume: the training text is not the one that {start} was trained on ({config.data})")
    if start is None:
        folder = run_folder(config.out, "lm", overwrite)
    else:
        folder = run_folder((given or {}).get("out") or str(start.parent), "lm", overwrite=True)
    config = dataclasses.replace(config, out=str(folder))
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    torch.manual_seed(config.seed)
    task = LmTask(config, vocabulary, mark, len(corpus.valid) / max(len(ids["valid"]), 1))
    describe(echo, config, corpus, vocabulary, ids, task.model)
    unigram = unigram_perplexity(ids["train"], ids["valid"], len(vocabulary))
    echo(f"a unigram model has valid ppl {unigram:.2f}")
    progress = sys.stderr.isatty() if config.progress is None else config.progress
    fit(task, train, valid, folder, start, echo, progress)
    return finish(task, corpus, ids, unigram, folder, echo)


def loader(ids: Tensor, batch_size: int, bptt: int, what: str, pad: bool = False) -> BpttLoader:
    try:
        return BpttLoader(ids, batch_size, bptt, pad)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def describe(
    echo: Echo, config: LmConfig, corpus: Corpus, vocabulary: Vocabulary, ids: dict[str, Tensor], model: LanguageModel
) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    echo(
        f"{corpus.name}: {len(ids['train']):,} training and {len(ids['valid']):,} validation tokens, "
        f"{len(vocabulary):,} different ({config.level} level)"
    )
    echo(
        f"{config.layers} x {config.hidden_size} {config.cell.upper()} ({config.layer}), {parameters:,} parameters, "
        f"{torch.get_num_threads()} threads, run in {config.out}"
    )


def finish(task: LmTask, corpus: Corpus, ids: dict[str, Tensor], unigram: float, folder: Path, echo: Echo) -> LmResult:
    """Scores the best checkpoint on the validation and test text, samples from it, and times the two layers."""
    config, vocabulary = task.config, task.vocabulary
    model, _, _ = load_model(folder / BEST)
    valid = evaluate_stream(model, ids["valid"], config.eval_batch_size, config.bptt, len(corpus.valid))
    echo(f"valid: {valid.describe(config.level)}; a unigram model has {unigram:.2f}")
    test = None
    if corpus.test is not None:
        test_ids = vocabulary.encode(corpus.test)
        test = evaluate_stream(model, test_ids, config.eval_batch_size, config.bptt, len(corpus.test))
        echo(f"test:  {test.describe(config.level)}")
    echo(f"trained {task.trainer.global_step:,} steps in {task.seconds:.0f} s; best model: {folder / BEST}")
    sample = ""
    if config.sample:
        sample = generate(model, vocabulary, length=config.sample, temperature=0.8, seed=config.seed)
        (folder / "sample.txt").write_text(sample, encoding="utf-8")
        echo(f"--- sample ({folder / 'sample.txt'})\n{sample}\n---")
    times: dict[str, float] = {}
    if config.compare:
        times = compare_layers(model, config, ids["train"], config.compare)
        ratio = times["torch"] / times["fastrnn"]
        echo(
            f"training step of this model: fastrnn {times['fastrnn']:.1f} ms, torch.nn {times['torch']:.1f} ms "
            f"({ratio:.2f} x; median of {config.compare} each, interleaved)"
        )
    return LmResult(folder, model, vocabulary, task.history, unigram, valid, test, task.seconds, sample, times)

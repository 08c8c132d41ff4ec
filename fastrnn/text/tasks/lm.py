"""The language-model task: truncated back-propagation with a carried state; perplexity; a sample."""

from __future__ import annotations

import dataclasses
import math
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint as checkpoints
from ..compare import compare_layers, describe_times
from ..config import LmConfig
from ..data.corpus import load_corpus, load_text
from ..data.prepare import is_prepared, load_prepared
from ..data.segment import Segmenter
from ..data.stream import IGNORE, BpttLoader
from ..data.tokens import Vocabulary
from ..errors import UserError
from ..evaluate import Score, chosen, count, evaluate_stream, perplexity, unigram_perplexity
from ..models.lm import LanguageModel, State, detach, move
from ..runs import BEST
from ..sampling import generate
from ..task import Data, Echo, Result, Task
from ..training import train


@dataclasses.dataclass
class LmData(Data):
    """Streams of token ids by split, tensors or memory-mapped files, and how many characters they were."""

    vocabulary: Vocabulary
    ids: dict[str, Any]
    chars: dict[str, int]


@dataclasses.dataclass
class LmResult(Result):
    """What a run reached. Perplexities are per token."""

    vocabulary: Vocabulary
    unigram_ppl: float
    valid: Score
    test: Score | None
    sample: str
    layer_ms: dict[str, float]


class LmTask(Task):
    """Trains a LanguageModel on windows that follow one another; the state flows from each to the next."""

    name = "lm"
    Config = LmConfig
    config: LmConfig
    data: LmData

    def __init__(self, config: LmConfig, data: LmData) -> None:
        super().__init__(config, data)
        self.model = LanguageModel(config, len(data.vocabulary))
        self.state: State | None = None
        self.valid_state: State | None = None
        self.unigram = unigram_perplexity(data.ids["train"], data.ids["valid"], len(data.vocabulary))

    @classmethod
    def load(cls, config: LmConfig, saved: dict[str, Any] | None) -> LmData:
        if is_prepared(config.data):
            found = load_prepared(config.data or "")
            name, vocabulary, ids, chars, mark = found.name, found.vocabulary, found.ids, found.chars, found.mark
        else:
            corpus = load_corpus(config.data, column=config.text_column)
            if saved is None:
                segmenter = Segmenter(config.words, config.lower)
                vocabulary = Vocabulary.build(corpus.train, config.level, config.vocab_size, segmenter)
            else:
                vocabulary = Vocabulary.from_state(saved["tokenizer"])
            texts = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
            ids = {split: vocabulary.encode(text) for split, text in texts.items() if text is not None}
            name, chars = corpus.name, {split: len(text) for split, text in texts.items() if text is not None}
            mark = f"{len(ids['train'])} tokens, crc32 {zlib.crc32(ids['train'].numpy().tobytes()):08x}"
        train = loader(
            ids["train"], config.batch_size, config.bptt, f"{name} (train)", False, config.varied_bptt, config.seed
        )
        valid = loader(ids["valid"], config.eval_batch_size, config.bptt, f"{name} (valid)", pad=True)
        return LmData(name, mark, vocabulary.state(), train, valid, vocabulary, ids, chars)

    def describe(self) -> list[str]:
        c, ids = self.config, self.data.ids
        parameters = sum(p.numel() for p in self.model.parameters())
        found = f"{len(ids['train']):,} training and {len(ids['valid']):,} validation tokens"
        return [
            f"{self.data.name}: {found}, {len(self.data.vocabulary):,} different ({self.data.vocabulary.level} level)",
            f"{c.layers} x {c.hidden_size} {c.cell.upper()} ({c.layer}), {parameters:,} parameters",
            f"a unigram model has valid ppl {self.unigram:.2f}",
        ]

    def on_train_start(self) -> None:
        super().on_train_start()
        self.state = move(self.state, self.device)  # a checkpoint is read onto the CPU

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.state = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        summed, penalty, state = self.model.loss(tokens, targets, self.state)
        self.state = detach(state)
        self.trained(targets.numel(), loss=summed.item(), count=targets.numel())
        loss: Tensor = summed / targets.numel() + penalty
        return loss

    def lr_factor(self, batch: tuple[Tensor, Tensor], group: dict[str, Any]) -> float:
        return len(batch[0]) / self.config.bptt if self.config.varied_bptt else 1.0

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.valid_state = None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens, targets = batch
        summed, _, self.valid_state = self.model.loss(tokens, targets, self.valid_state)
        self.validated(loss=summed.item(), count=int((targets != IGNORE).sum()))

    def scores(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        chars = self.data.chars["valid"] / len(self.data.ids["valid"])  # per token
        return {
            "valid_loss": loss,
            "valid_ppl": perplexity(loss),
            "valid_bits_per_char": loss / math.log(2) / chars,
        }

    def describe_epoch(self, row: dict[str, float]) -> str:
        bits = "" if self.data.vocabulary.level == "word" else f" ({row['valid_bits_per_char']:.3f} bits per character)"
        return (
            f"epoch {row['epoch']:.0f}/{self.trainer.max_epochs}: train ppl {perplexity(row['train_loss']):.2f}, "
            f"valid ppl {row['valid_ppl']:.2f}{bits}, {row['tokens_per_s']:,.0f} tokens/s"
        )

    def extra_state(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state["state"]

    def finish(self, folder: Path, echo: Echo) -> LmResult:
        """Scores the best checkpoint on the validation and test text, samples from it, and times the two layers."""
        c, data = self.config, self.data
        model, vocabulary, _ = load_model(folder / BEST)
        valid = evaluate_stream(model, data.ids["valid"], c.eval_batch_size, c.bptt, data.chars["valid"])
        echo(f"valid: {valid.describe(vocabulary.level)}; a unigram model has {self.unigram:.2f}")
        test = None
        if "test" in data.ids:
            test = evaluate_stream(model, data.ids["test"], c.eval_batch_size, c.bptt, data.chars["test"])
            echo(f"test:  {test.describe(vocabulary.level)}")
        echo(f"trained {self.trainer.global_step:,} steps in {self.seconds:.0f} s; best model: {folder / BEST}")
        sample = ""
        if c.sample:
            sample = generate(model, vocabulary, length=c.sample, temperature=0.8, seed=c.seed)
            (folder / "sample.txt").write_text(sample, encoding="utf-8")
            echo(f"--- sample ({folder / 'sample.txt'})\n{sample}\n---")
        times = self.compare(model) if c.compare else {}
        if times:
            echo(describe_times(times, c.compare))
        return LmResult(
            folder, model, self.history, self.seconds, vocabulary, self.unigram, valid, test, sample, times
        )  # fmt: skip

    @classmethod
    def evaluate(cls, path: str, data: str | None, split: str | None, batch_size: int, layer: str | None) -> list[str]:
        model, vocabulary, config = load_model(path, layer)
        name = ""
        if data is None and not is_prepared(config.data):
            corpus = load_corpus(config.data, column=config.text_column)
            texts = {"valid": corpus.valid, "train": corpus.train, **({"test": corpus.test} if corpus.test else {})}
            split = chosen(corpus.name, texts, split)
            ids, chars, name = vocabulary.encode(texts[split]), len(texts[split]), f"{corpus.name} ({split}): "
        elif is_prepared(data or config.data):
            data = data or config.data or ""
            found = load_prepared(data)
            if found.vocabulary.state() != vocabulary.state():
                raise UserError(f"{data}: prepared with another vocabulary than the model's: evaluate on the text")
            split = split or ("test" if "test" in found.ids else "valid")
            if split not in found.ids:
                raise UserError(f"{data}: no split {split}; there are: {', '.join(sorted(found.ids))}")
            ids, chars = found.ids[split], found.chars[split]
        else:
            text = load_text(data or "", split, config.text_column)
            ids, chars = vocabulary.encode(text), len(text)
        lines = [name + evaluate_stream(model, ids, batch_size, config.bptt, chars).describe(vocabulary.level)]
        if vocabulary.unknown is not None:
            share = count(ids, len(vocabulary))[vocabulary.unknown] / len(ids)
            lines.append(f"{share:.2%} of the tokens are <unk>: unknown to the model's vocabulary, or so in the text")
        return lines

    def compare(self, model: LanguageModel) -> dict[str, float]:
        """Median milliseconds of a training step by layer library, the state carried."""
        config = self.config
        models = {}
        for layer in ("fastrnn", "torch"):
            models[layer] = LanguageModel(dataclasses.replace(config, layer=layer), len(self.data.vocabulary))
            models[layer].load_state_dict(model.state_dict())
        states: dict[str, State] = dict.fromkeys(models)

        def loss(layer: str, batch: tuple[Tensor, Tensor]) -> Tensor:
            summed, penalty, state = models[layer].loss(*batch, states[layer])
            states[layer] = detach(state)
            mean: Tensor = summed / batch[1].numel() + penalty
            return mean

        train = BpttLoader(self.data.ids["train"], config.batch_size, config.bptt)
        return compare_layers(models, train, loss, config.clip, config.compare)


def loader(
    ids: Any, batch_size: int, bptt: int, what: str, pad: bool = False, varied: bool = False, seed: int = 0
) -> BpttLoader:
    try:
        return BpttLoader(ids, batch_size, bptt, pad, varied, seed)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def load_model(path: str | Path, layer: str | None = None) -> tuple[LanguageModel, Vocabulary, LmConfig]:
    """The model of a checkpoint, in eval mode on the CPU, its vocabulary and configuration.

    `layer` ("fastrnn" or "torch") overrides whose layers it was trained with. Raises UserError for a bad file.
    """
    checkpoint = checkpoints.load(path, "lm")
    head = checkpoint["fastrnn"]
    config = LmConfig(**{**head["config"], "devices": 1, "nodes": 1, **({"layer": layer} if layer else {})})
    vocabulary = Vocabulary.from_state(head["tokenizer"])
    model = LanguageModel(config, len(vocabulary))
    model.load_state_dict(checkpoints.weights(checkpoint))
    return model.eval(), vocabulary, config


def train_lm(config: LmConfig, *args: Any, **options: Any) -> LmResult:
    """Trains a language model; see `training.train` for arguments and errors. The command `fastrnn train lm`."""
    result: LmResult = train(LmTask, config, *args, **options)
    return result

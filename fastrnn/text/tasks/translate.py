"""The translation task: cross-entropy of the next target token; BLEU of beam search, pictures of the attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint as checkpoints
from ..beam import beam_search
from ..compare import compare_layers, describe_times
from ..config import TranslateConfig
from ..data.batches import pad
from ..data.pairs import Pairs, load_pairs, read_pairs
from ..data.parallel import PairBatch, Sides, Translations, encode
from ..data.stream import IGNORE
from ..distributed import gather, share, world
from ..errors import UserError
from ..evaluate import chosen, perplexity
from ..models.seq2seq import Seq2Seq, cross_entropy
from ..plots import draw_matrix
from ..runs import BEST
from ..task import Data, Echo, Result, Task
from ..training import train


@dataclasses.dataclass
class TranslateData(Data):
    sides: Sides
    splits: dict[str, Translations]


@dataclasses.dataclass
class Bleu:
    """sacreBLEU of `count` pairs, what it was computed by, and the share of translations equal to their reference."""

    bleu: float
    signature: str
    exact: float
    count: int

    def describe(self) -> str:
        return f"BLEU {self.bleu:.2f}, {self.exact:.1%} exact ({self.count:,} pairs; sacrebleu {self.signature})"


@dataclasses.dataclass
class TranslateResult(Result):
    """What a run reached: BLEU of the best checkpoint, and `examples`: source, reference, translation."""

    sides: Sides
    valid: Bleu
    test: Bleu
    examples: list[tuple[str, str, str]]
    layer_ms: dict[str, float]


class TranslateTask(Task):
    """Trains a Seq2Seq on batches of pairs of like length, the target's own tokens as its inputs."""

    name = "translate"
    Config = TranslateConfig
    config: TranslateConfig
    data: TranslateData

    def __init__(self, config: TranslateConfig, data: TranslateData) -> None:
        super().__init__(config, data)
        self.model = Seq2Seq(config, len(data.sides.source), len(data.sides.target))
        self.bleu: float | None = None  # of this epoch

    @classmethod
    def packages(cls, config: TranslateConfig) -> dict[str, str]:
        return {**super().packages(config), "sacrebleu": "BLEU needs sacrebleu: pip install 'fastrnn[train]'"}

    @classmethod
    def load(cls, config: TranslateConfig, saved: dict[str, Any] | None) -> TranslateData:
        name, pairs = load_pairs(config, config.data)
        sides = Sides.from_state(saved["tokenizer"]) if saved else Sides.build(config, pairs["train"])
        splits = {split: encode(sides, found) for split, found in pairs.items() if split != "train"}
        splits["train"] = encode(sides, pairs["train"], config.max_length, config.too_long, f"{name} (train)")
        train, valid = splits["train"].loader(config, True), splits["valid"].loader(config, False)
        return TranslateData(name, splits["train"].mark(), sides.state(), train, valid, sides, splits)

    def describe(self) -> list[str]:
        c, data = self.config, self.data
        sizes = ", ".join(f"{len(data.splits[name].pairs):,} {name}" for name in ("train", "valid", "test"))
        parameters = sum(p.numel() for p in self.model.parameters())
        network = f"{c.layers} x {c.hidden_size} {c.cell.upper()} ({c.layer}), {c.attention} attention"
        lines = [f"{data.name}: {sizes} pairs, {data.sides.describe()}", f"{network}, {parameters:,} parameters"]
        if dropped := data.splits["train"].dropped:
            lines.append(f"{dropped:,} training pairs longer than {c.max_length} were left out (--max-length)")
        return lines

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        logits, smoothing = self.model(batch.source, batch.lengths, batch.inputs), self.config.label_smoothing
        summed, count = cross_entropy(logits, batch.targets, smoothing), int((batch.targets != IGNORE).sum())
        self.trained(int(batch.lengths.sum()) + count, loss=summed.item(), count=count)
        return summed * (world() / batch.total)  # processes' gradients are averaged: together, the mean

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        logits = self.model(batch.source, batch.lengths, batch.inputs)
        right = (logits.argmax(2) == batch.targets).sum().item()
        count = int((batch.targets != IGNORE).sum())
        self.validated(loss=cross_entropy(logits, batch.targets).item(), count=count, right=right)

    def on_validation_epoch_end(self) -> None:
        """Every --bleu-every epochs the processes translate the validation pairs, each a part of them."""
        every, c, self.bleu = self.config.bleu_every, self.config, None
        if every and (self.trainer.current_epoch + 1) % every == 0:
            pairs = self.data.splits["valid"].pairs[: c.score_pairs or None]
            sources = [source for source, _ in pairs[share(len(pairs))]]
            own = translate(self.model, self.data.sides, sources, c.beam, c.length_penalty)
            self.bleu = bleu([text for part in gather(own) for text in part], pairs, c).bleu
        super().on_validation_epoch_end()

    def scores(self, sums: dict[str, Any]) -> dict[str, float]:
        loss = sums["loss"] / sums["count"]
        scored = {} if self.bleu is None else {"valid_bleu": self.bleu}
        return {
            **scored,
            "valid_loss": loss,
            "valid_ppl": perplexity(loss),
            "valid_token_accuracy": sums["right"] / sums["count"],
        }

    def describe_epoch(self, row: dict[str, float]) -> str:
        scored = f"BLEU {row['valid_bleu']:.2f}, " if "valid_bleu" in row else ""
        return (
            f"epoch {row['epoch']:.0f}/{self.trainer.max_epochs}: train ppl {perplexity(row['train_loss']):.2f}, "
            f"valid ppl {row['valid_ppl']:.2f}, {scored}{row['valid_token_accuracy']:.1%} of tokens right, "
            f"{row['tokens_per_s']:,.0f} tokens/s"
        )

    def finish(self, folder: Path, echo: Echo) -> TranslateResult:
        """BLEU of the best checkpoint on validation and test; examples, and pictures of their attention."""
        c, data = self.config, self.data
        model, sides, _ = load_translator(folder / BEST)
        scored = {}
        for name in ("valid", "test"):
            pairs = data.splits[name].pairs[: c.score_pairs or None]
            scored[name] = score(model, sides, pairs, c)
            echo(f"{name}: {scored[name].describe()}")
        echo(f"trained {self.trainer.global_step:,} steps in {self.seconds:.0f} s; best model: {folder / BEST}")
        pairs = data.splits["test"].pairs[: c.examples]
        found = translate(model, sides, [s for s, _ in pairs], c.beam, c.length_penalty) if pairs else []
        examples = [(s, t, f) for (s, t), f in zip(pairs, found, strict=True)]
        for s, t, f in examples:
            echo(f"  {s}\n    reference  {t}\n    translated {f}")
        if c.report:
            for number, (s, _, f) in enumerate(examples[:3], 1):
                draw_attention(model, sides, s, f, folder / f"attention-{number}.png")
        times = self.compare(model) if c.compare else {}
        if times:
            echo(describe_times(times, c.compare))
        return TranslateResult(
            folder, model, self.history, self.seconds, sides, scored["valid"], scored["test"], examples, times
        )

    def compare(self, model: Seq2Seq) -> dict[str, float]:
        """Median milliseconds of a training step by layer library."""
        models, sides = {}, self.data.sides
        for layer in ("fastrnn", "torch"):
            config = dataclasses.replace(self.config, layer=layer)
            models[layer] = Seq2Seq(config, len(sides.source), len(sides.target))
            models[layer].load_state_dict(model.state_dict())

        def loss(layer: str, batch: PairBatch) -> Tensor:
            return cross_entropy(models[layer](batch.source, batch.lengths, batch.inputs), batch.targets) / batch.total

        batches = self.data.splits["train"].loader(self.config, True)
        return compare_layers(models, batches, loss, self.config.clip, self.config.compare)

    @classmethod
    def evaluate(cls, path: str, data: str | None, split: str | None, batch_size: int, layer: str | None) -> list[str]:
        model, sides, config = load_translator(path, layer)
        if data is None:
            name, pairs = load_pairs(config, config.data)
            split = chosen(name, pairs, split)
            return [f"{name} ({split}): {score(model, sides, pairs[split], config).describe()}"]
        name, pairs = read_pairs(config, data)
        if split is None:  # a table as it is; of a folder its test, valid or only pairs
            split = next(s for s in ("test", "valid", "train") if s in pairs)
        elif split not in pairs:  # what training held out
            name, pairs = load_pairs(config, data)
        if split not in pairs:
            raise UserError(f"{data}: no split {split}; there are: {', '.join(sorted(pairs))}")
        return [f"{name}: {score(model, sides, pairs[split], config).describe()}"]


def translate(
    model: Seq2Seq, sides: Sides, texts: Sequence[str], beam: int = 5, penalty: float = 1.0, batch_size: int = 32
) -> list[str]:
    """The translation of each text by beam search, at most twice as long as its source and 20 tokens."""
    model.eval()
    ids = sides.source.encode_all(texts)
    found = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        source, lengths = pad([ids[i] for i in rows])
        limit = 2 * len(source) + 20
        for i, best in zip(
            rows, beam_search(model, source, lengths, beam, limit, penalty, sides.target.unknown), strict=True
        ):
            found[i] = sides.text(best.tokens)
    return found


def score(model: Seq2Seq, sides: Sides, pairs: Pairs, config: TranslateConfig) -> Bleu:
    """BLEU of the translations against the targets as they are in the data, lower-cased if the model is."""
    found = translate(model, sides, [source for source, _ in pairs], config.beam, config.length_penalty)
    return bleu(found, pairs, config)


def bleu(found: Sequence[str], pairs: Pairs, config: TranslateConfig) -> Bleu:
    """BLEU of the translations `found` of `pairs`."""
    from sacrebleu.metrics.bleu import BLEU

    references = [target.lower() if config.lower else target for _, target in pairs]
    metric = BLEU(tokenize="zh" if any("\u4e00" <= c <= "\u9fff" for c in "".join(references[:20])) else "13a")
    value = metric.corpus_score(list(found), [references]).score
    exact = sum(f == r for f, r in zip(found, references, strict=True)) / max(len(found), 1)
    signature = str(metric.get_signature()) + ("|lower-cased" if config.lower else "")
    return Bleu(value, signature, exact, len(pairs))


def draw_attention(model: Seq2Seq, sides: Sides, source: str, target: str, path: Path) -> None:
    """Where the decoder looked for each token of `target`."""
    (s,), (t,) = sides.source.encode_all([source]), sides.target.encode_all([target])
    with torch.inference_mode():
        memory, state = model.encode(s.unsqueeze(1), torch.tensor([len(s)]))
        inputs = torch.cat([torch.tensor([model.begin]), t]).unsqueeze(1)
        _, _, weights = model.decode(inputs, state, memory)
    rows = [sides.target.decode([int(i)]) for i in t] + ["(end)"]
    columns = [sides.source.decode([int(i)]) for i in s]
    draw_matrix(weights[:, 0].numpy(), rows, columns, ("translation", "source"), path, numbers=False)


def load_translator(path: str | Path, layer: str | None = None) -> tuple[Seq2Seq, Sides, TranslateConfig]:
    """The model of a checkpoint, in eval mode on the CPU, the vocabularies of both sides, and its configuration.

    `layer` ("fastrnn" or "torch") overrides whose layers it was trained with. Raises UserError for a bad file.
    """
    checkpoint = checkpoints.load(path, "translate")
    head = checkpoint["fastrnn"]
    config = TranslateConfig(**{**head["config"], "devices": 1, "nodes": 1, **({"layer": layer} if layer else {})})
    sides = Sides.from_state(head["tokenizer"])
    model = Seq2Seq(config, len(sides.source), len(sides.target))
    model.load_state_dict(checkpoints.weights(checkpoint))
    return model.eval(), sides, config


def train_translate(config: TranslateConfig, *args: Any, **options: Any) -> TranslateResult:
    """Trains a translator; see `training.train` for arguments and errors. The command `fastrnn train translate`."""
    result: TranslateResult = train(TranslateTask, config, *args, **options)
    return result

"""The classification task: cross-entropy or squared error over sequences; accuracy, F1, a confusion matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checkpoint as checkpoints
from ..compare import compare_layers, describe_times
from ..config import ClassifyConfig
from ..data.labelled import Batch, Encoded, Encoder, encode, read_splits
from ..distributed import world
from ..errors import UserError
from ..evaluate import chosen
from ..models.classifier import Classifier
from ..plots import draw_matrix
from ..pretrained import adopt, layer_groups, start_from, vocabulary_of
from ..runs import BEST
from ..scores import Scores, class_scores, number_scores
from ..task import Data, Echo, Result, Task, add
from ..training import train


@dataclasses.dataclass
class ClassifyData(Data):
    encoder: Encoder
    splits: dict[str, Encoded]
    resumed: bool


@dataclasses.dataclass
class ClassifyResult(Result):
    """What a run reached: scores of the best checkpoint on the validation and test splits."""

    encoder: Encoder
    valid: Scores
    test: Scores | None
    layer_ms: dict[str, float]


class ClassifyTask(Task):
    """Trains a Classifier on batches of sequences of like length."""

    name = "classify"
    Config = ClassifyConfig
    config: ClassifyConfig
    data: ClassifyData

    def __init__(self, config: ClassifyConfig, data: ClassifyData) -> None:
        super().__init__(config, data)
        self.model = Classifier(config, data.encoder.inputs, data.encoder.outputs)
        if config.pretrained is not None and not data.resumed:
            start_from(self.model, config.pretrained)

    @classmethod
    def configure(cls, config: ClassifyConfig) -> ClassifyConfig:
        return config if config.pretrained is None else adopt(config, config.pretrained)

    @classmethod
    def load(cls, config: ClassifyConfig, saved: dict[str, Any] | None) -> ClassifyData:
        name, splits = read_splits(config, config.data)
        if saved:
            encoder = Encoder.from_state(saved["tokenizer"])
        else:
            vocabulary = None if config.pretrained is None else vocabulary_of(config.pretrained)
            encoder = Encoder.build(config, splits["train"], vocabulary, name)
        encoded = {split: encode(encoder, config, found, f"{name} ({split})") for split, found in splits.items()}
        train, valid = encoded["train"].loader(config, True), encoded["valid"].loader(config, False)
        mark = encoded["train"].mark()
        return ClassifyData(name, mark, encoder.state(), train, valid, encoder, encoded, saved is not None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, or of a pretrained model one for each layer, the output (depth 0) first."""
        return super().parameter_groups() if self.config.pretrained is None else layer_groups(self.model)

    def lr_factor(self, batch: Batch, group: dict[str, Any]) -> float:
        depth, unfreeze = group.get("depth", 0), self.config.unfreeze
        if self.trainer.current_epoch < depth * unfreeze:
            return 0.0
        decay: float = self.config.layer_decay**-depth
        return decay

    def describe(self) -> list[str]:
        c, encoder, splits = self.config, self.data.encoder, self.data.splits
        named = [name for name in ("train", "valid", "test") if name in splits]
        sizes = ", ".join(f"{len(splits[name].inputs):,} {name}" for name in named)
        what = f"{len(encoder.labels)} classes" if encoder.labels else "numbers"
        tokens = f"{encoder.features} features" if encoder.vocabulary is None else f"{encoder.inputs:,} tokens"
        parameters = sum(p.numel() for p in self.model.parameters())
        both = "bidirectional " if c.bidirectional else ""
        lines = [
            f"{self.data.name}: {sizes} examples, {what}, {tokens}",
            f"{c.layers} x {c.hidden_size} {both}{c.cell.upper()} ({c.layer}), {parameters:,} parameters",
        ]
        if c.pretrained is not None:
            lines.append(f"starting from the language model {c.pretrained}")
        if cut := sum(s.cut for s in splits.values()):
            lines.append(f"{cut:,} sequences longer than {c.max_length} were cut there (--max-length)")
        if encoder.labels:
            share = splits["valid"].targets.bincount(minlength=2).max().item() / len(splits["valid"].targets)
            lines.append(f"the most frequent class makes {share:.1%} of the validation examples")
        return lines

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss summed over the examples of `batch`, and the outputs (B, outputs)."""
        outputs = self.model(batch.x, batch.lengths)
        if self.data.encoder.labels:
            return F.cross_entropy(outputs, batch.targets, reduction="sum"), outputs
        return F.mse_loss(outputs.squeeze(1), batch.targets, reduction="sum"), outputs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        summed, _ = self.loss(batch)
        self.trained(int(batch.lengths.sum()), loss=summed.item(), count=len(batch.targets))
        return summed * (world() / batch.total)  # processes' gradients are averaged: together, the mean

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        summed, outputs = self.loss(batch)
        self.validated(loss=summed.item(), count=len(batch.targets), **tally(self.data.encoder, outputs, batch.targets))

    def scores(self, sums: dict[str, Any]) -> dict[str, float]:
        return {f"valid_{name}": value for name, value in scores_of(self.data.encoder, sums).figures().items()}

    def describe_epoch(self, row: dict[str, float]) -> str:
        valid = scores_of(self.data.encoder, self.valid_sums).describe()
        return (
            f"epoch {row['epoch']:.0f}/{self.trainer.max_epochs}: train loss {row['train_loss']:.4f}, valid {valid}, "
            f"{row['tokens_per_s']:,.0f} tokens/s"
        )

    def finish(self, folder: Path, echo: Echo) -> ClassifyResult:
        """Scores the best checkpoint, draws its confusion matrix, and times the two layers."""
        data, config = self.data, self.config
        model, encoder, _ = load_classifier(folder / BEST)
        scored = {name: score(model, encoder, data.splits[name], config) for name in data.splits if name != "train"}
        for name, scores in scored.items():
            echo(f"{name}: {scores.describe()}")
        echo(f"trained {self.trainer.global_step:,} steps in {self.seconds:.0f} s; best model: {folder / BEST}")
        shown = "test" if "test" in scored else "valid"
        if encoder.labels and config.report:
            path = folder / "confusion-matrix.png"
            matrix = scored[shown].confusion
            draw_matrix(matrix.numpy(), encoder.labels, encoder.labels, ("true", "predicted"), path, numbers=True)
            echo(f"confusion matrix ({shown}): {path}")
        times = self.compare(model) if config.compare else {}
        if times:
            echo(describe_times(times, config.compare))
        valid, test = scored["valid"], scored.get("test")
        return ClassifyResult(folder, model, self.history, self.seconds, encoder, valid, test, times)

    def compare(self, model: Classifier) -> dict[str, float]:
        """Median milliseconds of a training step by layer library: `lengths=` against PackedSequence."""
        encoder, models = self.data.encoder, {}
        for layer in ("fastrnn", "torch"):
            config = dataclasses.replace(self.config, layer=layer)
            models[layer] = Classifier(config, encoder.inputs, encoder.outputs)
            models[layer].load_state_dict(model.state_dict())

        def loss(layer: str, batch: Batch) -> Tensor:
            outputs = models[layer](batch.x, batch.lengths)
            return (
                F.cross_entropy(outputs, batch.targets)
                if encoder.labels
                else F.mse_loss(outputs.squeeze(1), batch.targets)
            )

        batches = self.data.splits["train"].loader(self.config, True)
        return compare_layers(models, batches, loss, self.config.clip, self.config.compare)

    @classmethod
    def evaluate(cls, path: str, data: str | None, split: str | None, batch_size: int, layer: str | None) -> list[str]:
        model, encoder, config = load_classifier(path, layer)
        if data is None:
            name, splits = read_splits(config, config.data)
            split = chosen(name, splits, split)
            scores = score(model, encoder, encode(encoder, config, splits[split], name), config)
            return [f"{name} ({split}): {scores.describe()}", *scores.table(encoder.labels)]
        name, splits = read_splits(config, data, held_out=False)
        if split is None:  # all of a table; of a folder its test, valid or only examples
            split = next(s for s in ("test", "valid", "train") if s in splits)
        elif split not in splits:  # what training held out
            name, splits = read_splits(config, data)
        if split not in splits:
            raise UserError(f"{data}: no split {split}; there are: {', '.join(sorted(splits))}")
        scores = score(model, encoder, encode(encoder, config, splits[split], name), config)
        return [f"{name}: {scores.describe()}", *scores.table(encoder.labels)]


def tally(encoder: Encoder, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    """What the scores of a split are summed from."""
    if encoder.labels:
        n = len(encoder.labels)
        pairs = targets * n + outputs.argmax(1)
        return {"confusion": torch.bincount(pairs.cpu(), minlength=n * n).reshape(n, n)}
    values, truth = outputs.squeeze(1).double().cpu(), targets.double().cpu()
    return {
        "absolute": (values - truth).abs().sum().item(),
        "squared": (values - truth).square().sum().item(),
        "truth": truth.sum().item(),
        "truth_squared": truth.square().sum().item(),
    }


def scores_of(encoder: Encoder, sums: dict[str, Any]) -> Scores:
    loss = sums["loss"] / sums["count"]
    if encoder.labels:
        return class_scores(loss, sums["confusion"])
    return number_scores(loss, int(sums["count"]), sums, encoder.target_std)


@torch.inference_mode()
def score(model: Classifier, encoder: Encoder, data: Encoded, config: ClassifyConfig) -> Scores:
    """The scores of `model` on a split."""
    model.eval()
    sums: dict[str, Any] = {}
    for batch in data.loader(config, False):
        outputs = model(batch.x, batch.lengths)
        if encoder.labels:
            summed = F.cross_entropy(outputs, batch.targets, reduction="sum")
        else:
            summed = F.mse_loss(outputs.squeeze(1), batch.targets, reduction="sum")
        more = tally(encoder, outputs, batch.targets)
        add(sums, {"loss": summed.item(), "count": len(batch.targets), **more})
    return scores_of(encoder, sums)


@torch.inference_mode()
def predict(
    model: Classifier,
    encoder: Encoder,
    contents: Iterable[Any],
    config: ClassifyConfig,
    batch_size: int = 64,
    name: str = "input",
) -> list[dict[str, float]]:
    """For each text (or series (T, F)), the probability of each label, likeliest first; for regression {"value": v}.

    Raises UserError, which begins with `name`, for series of another number of features than in training.
    """
    model.eval()
    found, inputs = [], encoder.contents(list(contents), name)
    for start in range(0, len(inputs), batch_size):
        data = Encoded([x[: config.max_length or None] for x in inputs[start : start + batch_size]], torch.zeros(0), 0)
        count = len(data.inputs)
        batch = Encoded(data.inputs, torch.zeros(count), 0).collate(list(range(count)), list(range(count)))
        outputs = model(batch.x, batch.lengths)
        if encoder.labels:
            for row in outputs.softmax(1).tolist():
                pairs = sorted(zip(encoder.labels, row, strict=True), key=lambda pair: -pair[1])
                found.append(dict(pairs))
        else:
            found += [{"value": v * encoder.target_std + encoder.target_mean} for v in outputs.squeeze(1).tolist()]
    return found


def load_classifier(path: str | Path, layer: str | None = None) -> tuple[Classifier, Encoder, ClassifyConfig]:
    """The model of a checkpoint, in eval mode on the CPU, how examples become tensors, and its configuration.

    `layer` ("fastrnn" or "torch") overrides whose layers it was trained with. Raises UserError for a bad file.
    """
    checkpoint = checkpoints.load(path, "classify")
    head = checkpoint["fastrnn"]
    config = ClassifyConfig(**{**head["config"], "devices": 1, "nodes": 1, **({"layer": layer} if layer else {})})
    encoder = Encoder.from_state(head["tokenizer"])
    model = Classifier(config, encoder.inputs, encoder.outputs)
    model.load_state_dict(checkpoints.weights(checkpoint))
    return model.eval(), encoder, config


def train_classify(config: ClassifyConfig, *args: Any, **options: Any) -> ClassifyResult:
    """Trains a classifier; see `training.train` for arguments and errors. The command `fastrnn train classify`."""
    result: ClassifyResult = train(ClassifyTask, config, *args, **options)
    return result

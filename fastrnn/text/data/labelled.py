"""Labelled examples as tensors: vocabulary and labels found in the training examples, long sequences cut or refused."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ClassifyConfig
from ..errors import UserError
from .batches import BucketLoader, pad
from .hub import on_hub
from .records import Example, Splits, load_examples, read_examples
from .segment import Segmenter
from .series import load_series, read_all_series
from .tokens import Vocabulary


class Batch(NamedTuple):
    """`x` (T, B) int64 or (T, B, F) float32, padded; `lengths` (B,); `targets` (B,), int64 classes or float32; `total`,
    the examples of this step over all processes."""

    x: Tensor
    lengths: Tensor
    targets: Tensor
    total: int


@dataclasses.dataclass
class Encoder:
    """How examples become tensors. `vocabulary` is None for series; `labels` is empty for regression.

    Series and regression targets are brought to mean 0 and deviation 1 of the training examples.
    """

    vocabulary: Vocabulary | None
    labels: list[str]
    features: int = 0
    feature_mean: list[float] = dataclasses.field(default_factory=list)
    feature_std: list[float] = dataclasses.field(default_factory=list)
    target_mean: float = 0.0
    target_std: float = 1.0

    @classmethod
    def build(
        cls, config: ClassifyConfig, train: list[Example], vocabulary: Vocabulary | None = None, name: str = "input"
    ) -> Encoder:
        """From the training examples of the data called `name`; `vocabulary` is one to keep to."""
        encoder = cls(None, [])
        if config.target == "class":
            encoder.labels = sorted({e.label for e in train})
            if len(encoder.labels) < 2:
                label = encoder.labels[0]
                raise UserError(f"{name}: all training examples have the label '{label}': two classes are needed")
        else:
            numbers = torch.tensor([number(e.label, name) for e in train], dtype=torch.float64)
            encoder.target_mean, encoder.target_std = numbers.mean().item(), deviation(numbers).item()
        if vocabulary is not None:
            encoder.vocabulary = vocabulary
        elif config.input == "text":
            text = "\n".join(e.content.replace("\n", " ") for e in train)
            size = config.vocab_size if config.level == "word" or config.level == "bpe" else None
            encoder.vocabulary = Vocabulary.build(text, config.level, size, Segmenter.from_options(config))
        else:
            steps = torch.cat([e.content for e in train if e.content.shape[1] == train[0].content.shape[1]]).double()
            encoder.features = steps.shape[1]
            encoder.feature_mean, encoder.feature_std = steps.mean(0).tolist(), deviation(steps).tolist()
        return encoder

    def state(self) -> dict[str, Any]:
        vocabulary = None if self.vocabulary is None else self.vocabulary.state()
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "vocabulary": vocabulary}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Encoder:
        vocabulary = None if state["vocabulary"] is None else Vocabulary.from_state(state["vocabulary"])
        return cls(**{**state, "vocabulary": vocabulary})

    @property
    def inputs(self) -> int:
        return self.features if self.vocabulary is None else len(self.vocabulary)

    @property
    def outputs(self) -> int:
        return len(self.labels) or 1

    def contents(self, contents: Sequence[Any], name: str = "input") -> list[Tensor]:
        """Token ids (T,), or standardised series (T, F)."""
        if self.vocabulary is not None:
            return self.vocabulary.encode_all(contents)
        for series in contents:
            if series.shape[1] != self.features:
                raise UserError(f"{name}: {series.shape[1]} features in a step, where training had {self.features}")
        mean, std = torch.tensor(self.feature_mean), torch.tensor(self.feature_std)
        return [(series - mean) / std for series in contents]

    def targets(self, examples: Sequence[Example], name: str) -> Tensor:
        if not self.labels:
            return torch.tensor([(number(e.label, name) - self.target_mean) / self.target_std for e in examples])
        index = {label: i for i, label in enumerate(self.labels)}
        for e in examples:
            if e.label not in index:
                raise UserError(f"{name}: the label '{e.label}' is not among those trained: {', '.join(self.labels)}")
        return torch.tensor([index[e.label] for e in examples])


@dataclasses.dataclass
class Encoded:
    """The examples of one split as tensors, and how many of them were cut."""

    inputs: list[Tensor]
    targets: Tensor
    cut: int

    def loader(self, config: ClassifyConfig, shuffle: bool) -> BucketLoader:
        lengths = [len(x) for x in self.inputs]
        least = config.world if shuffle else 1
        if shuffle and len(lengths) < least:
            raise UserError(f"{len(lengths)} training examples are too few for {least} processes")
        return BucketLoader(lengths, config.batch_size, self.collate, shuffle, config.seed, least)

    def collate(self, own: list[int], whole: list[int]) -> Batch:
        x, lengths = pad([self.inputs[i] for i in own])
        return Batch(x, lengths, self.targets[own], len(whole))

    def mark(self) -> str:
        """Tells whether two runs see the same examples."""
        crc = zlib.crc32(self.targets.numpy().tobytes())
        for x in self.inputs:
            crc = zlib.crc32(x.numpy().tobytes(), crc)
        return f"{len(self.inputs)} examples, crc32 {crc:08x}"


def encode(encoder: Encoder, config: ClassifyConfig, examples: list[Example], name: str) -> Encoded:
    """Raises UserError for unknown labels, and for long sequences where --too-long is refuse."""
    inputs, limit = encoder.contents([e.content for e in examples], name), config.max_length
    longer = [i for i, x in enumerate(inputs) if limit and len(x) > limit]
    if longer and config.too_long == "refuse":
        raise UserError(
            f"{name}: {len(longer)} sequences are longer than --max-length {limit}, example {longer[0] + 1} with "
            f"{len(inputs[longer[0]])} the first: --too-long cut, or a larger --max-length"
        )
    for i in longer:
        inputs[i] = inputs[i][:limit]
    return Encoded(inputs, encoder.targets(examples, name), len(longer))


def read_splits(config: ClassifyConfig, data: str | None, held_out: bool = True) -> tuple[str, Splits]:
    """The name of the data and its splits: as for training, or only its own where nothing is to be `held_out`."""
    if config.input == "series":
        if on_hub(data):
            raise UserError(f"--data {data}: data sets of the hub are read as texts; --input series reads files")
        return load_series(data, config.valid_share) if held_out else read_all_series(data)
    if not held_out:
        return read_examples(data, config.text_column, config.label_column)
    return load_examples(data, config.text_column, config.label_column, valid_share=config.valid_share)


def number(label: str, name: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{name}: the label '{label}' is not a finite number, as --target number needs")
    return value


def deviation(values: Tensor) -> Tensor:
    """Standard deviation over the first axis; 1 where nothing varies."""
    std = values.std(0, correction=0)
    return torch.where(std > 0, std, torch.ones_like(std))

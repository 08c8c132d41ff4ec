"""Predictions for texts from the command line, a file or standard input, by any checkpoint that makes some."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from .data.files import decode_text, read_bytes
from .errors import UserError
from .kernels import trusted


def predict_lines(path: str, text: str | None, data: str | None, top: int, beam: int, layer: str | None) -> list[str]:
    """A line for each input: the `top` likeliest labels with their probabilities, or a number, or a translation.

    Raises UserError for bad files and data, and where a kernel gave up.
    """
    with trusted("there is no prediction: predict again, or with --layer torch"):
        return list(predictions(path, text, data, top, beam, layer))


def predictions(path: str, text: str | None, data: str | None, top: int, beam: int, layer: str | None) -> Iterator[str]:
    task = checkpoints.load(path)["fastrnn"]["task"]
    if task == "translate":
        from .tasks.translate import load_translator, translate

        translator, sides, options = load_translator(path, layer)
        yield from translate(translator, sides, read_lines(text, data), beam, options.length_penalty)
        return
    if task == "lm":
        raise UserError(f"{path}: a language model; fastrnn generate draws text from it")
    from .data.series import read_series
    from .tasks.classify import load_classifier, predict

    model, encoder, config = load_classifier(path, layer)
    contents: list[Any]
    if encoder.vocabulary is not None:
        contents = read_lines(text, data)
    elif data is None:
        raise UserError("--data is needed: this model reads sequences of numbers, a .npy or .csv file")
    else:
        contents = [read_series(read_bytes(existing(data)), data)]
    for found in predict(model, encoder, contents, config, name=data or "input"):
        pairs = list(found.items())[:top]
        yield f"{pairs[0][1]:.6g}" if "value" in found else "\t".join(f"{label}\t{p:.4f}" for label, p in pairs)


def read_lines(text: str | None, data: str | None) -> list[str]:
    """The given text, or the lines of a file, or those of standard input."""
    if text is not None:
        return [text]
    if data is None:
        content = decode_text(sys.stdin.buffer.read(), "standard input")
    else:
        content = decode_text(read_bytes(existing(data)), data)
    lines = content.removesuffix("\n").split("\n")  # a line of output for each, whatever Unicode calls a line end
    if not content:
        raise UserError(f"{data or 'standard input'}: no line of text")
    return lines


def existing(data: str) -> Path:
    path = Path(data)
    if path.is_dir():
        raise UserError(f"{data}: a folder, and a file is needed")
    if not path.is_file():
        raise UserError(f"{data}: no such file")
    return path

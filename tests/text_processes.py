"""A small run of every task. As a script, run by test_text_processes.py in each of two processes: every task whole,
then stopped by a signal and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from text_support import TEXT

from fastrnn.text import (
    ClassifyConfig,
    Interrupted,
    LmConfig,
    TranslateConfig,
    train_classify,
    train_lm,
    train_translate,
)
from fastrnn.text.tasks import find_task

SHARED = {"device": "cpu", "compare": 0, "report": False, "progress": False, "epochs": 2, "devices": 2, "emb_size": 8,
          "hidden_size": 12, "lr": 0.02, "schedule": "constant"}  # fmt: skip
STOP_AT = {"lm": 33, "classify": 7, "translate": 12, "ulmfit": 12, "ulmfit_adam": 12}  # a step within an epoch


def write_data(folder):
    (folder / "text.txt").write_text(TEXT)
    words = ["cat", "dog", "fur", "sea", "salt", "tide"]
    rows = [" ".join(words[(i * j) % 3 + 3 * (i % 2)] for j in range(i % 5 + 2)) + f" {i % 11}" for i in range(68)]
    (folder / "data.csv").write_text("text,label\n" + "\n".join(f"{r},{i % 2}" for i, r in enumerate(rows)) + "\n")
    (folder / "pairs.tsv").write_text("".join(f"{r}\t{r[::-1]} {i}\n" for i, r in enumerate(rows)))


def configs(folder: Path, **changed):
    """A small run of each task on files in `folder`, and what trains it."""
    shared = {**SHARED, **changed}
    # Adam and clipping would hide a gradient of the wrong size
    plain = {**shared, "optimizer": "sgd", "lr": 0.5, "clip": 0.0}
    bleu = 0 if shared.get("strategy") == "fsdp" else 2
    pretrained = f"{folder}/two-lm/best.ckpt"
    labelled = ClassifyConfig(**plain, data=f"{folder}/data.csv", batch_size=7)
    return {
        "lm": (
            LmConfig(**shared, data=f"{folder}/text.txt", batch_size=4, bptt=16, sample=0, weight_drop=0.0),
            train_lm,
        ),
        "classify": (labelled, train_classify),
        "translate": (
            TranslateConfig(**plain, data=f"{folder}/pairs.tsv", batch_size=7, examples=0, bleu_every=bleu),
            train_translate,
        ),
        # Frozen in the first epoch are the layers of "lm", in the second its embedding.
        "ulmfit": (dataclasses.replace(labelled, pretrained=pretrained), train_classify),
        # An optimiser that has no state yet of what is frozen, and whole tensors of it for the rest.
        "ulmfit_adam": (
            dataclasses.replace(labelled, pretrained=pretrained, optimizer="adam", lr=0.02),
            train_classify,
        ),
    }


def interrupt(name: str, step: int):
    """The second process gets a signal at `step`; both must stop after it."""
    kind = find_task("classify" if name.startswith("ulmfit") else name)
    plain = kind.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, batch_idx)

    kind.training_step = training_step
    return lambda: setattr(kind, "training_step", plain)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    histories = {}
    for name, (config, train) in configs(folder, dropout=0.0).items():
        result = train(dataclasses.replace(config, out=f"{folder}/two-{name}"), echo=lambda line: None)
        if result is not None:
            histories[name] = result.history
    for name, (config, train) in configs(folder, dropout=0.0, strategy="fsdp").items():
        result = train(dataclasses.replace(config, out=f"{folder}/fsdp-{name}"), echo=lambda line: None)
        if result is not None:
            histories[f"fsdp-{name}"] = result.history
        config = dataclasses.replace(config, out=f"{folder}/fsdp-resumed-{name}", max_steps=STOP_AT[name])
        train(config, echo=lambda line: None)
        train(config, resume=config.out, given={"max_steps": -1}, echo=lambda line: None)
    for name, (config, train) in configs(folder, dropout=0.3).items():
        train(dataclasses.replace(config, out=f"{folder}/whole-{name}"), echo=lambda line: None)
        undo, config = interrupt(name, STOP_AT[name]), dataclasses.replace(config, out=f"{folder}/stopped-{name}")
        with pytest.raises(Interrupted) as stopped:
            train(config, echo=lambda line: None)
        assert stopped.value.signum == signal.SIGTERM
        undo()
        train(config, resume=config.out, echo=lambda line: None)
    if os.environ["RANK"] == "0":
        (folder / "histories.json").write_text(json.dumps(histories))


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    main(Path(sys.argv[1]))

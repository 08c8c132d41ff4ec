"""Export to ONNX with any number of steps and rows, and run in ONNX Runtime (extra [onnx]).

python examples/onnx_export.py --out tagger.onnx
"""

import argparse
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.export import Dim

import fastrnn


class Tagger(nn.Module):
    """Tags each word of ragged sentences: tokens (T, B) and lengths (B,) to logits (T, B, tags)."""

    def __init__(self, words=50, size=24, tags=5):
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.rnn = fastrnn.LSTM(size, size, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * size, tags)

    def forward(self, tokens, lengths):
        return self.head(self.rnn(self.embedding(tokens), lengths=lengths)[0])


def draw(steps, batch):
    return torch.randint(50, (steps, batch)), torch.randint(1, steps + 1, (batch,))


def export(model, path):
    steps, batch = Dim("steps", max=10_000), Dim("batch", max=10_000)
    program = torch.export.export(model, draw(7, 3), dynamic_shapes=({0: steps, 1: batch}, {0: batch}))
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)


def check(model, path, sizes):
    """The largest difference between PyTorch and ONNX Runtime over batches of these (steps, rows)."""
    session, worst = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), 0.0
    names = [i.name for i in session.get_inputs()]
    for size in sizes:
        args = draw(*size)
        (got,) = session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))
        with torch.no_grad():
            difference = np.abs(got - model(*args).numpy()).max().item()
        print(f"{size[0]} steps, {size[1]} rows: largest difference {difference:.1e}")
        worst = max(worst, difference)
    return worst


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write; a temporary folder otherwise")
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    model = Tagger().eval()
    with TemporaryDirectory() as folder:
        path = args.out or Path(folder) / "tagger.onnx"
        export(model, path)
        return {"difference": check(model, path, [(7, 3), (1, 1), (40, 16)])}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()

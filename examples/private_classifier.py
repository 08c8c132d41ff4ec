"""DP-SGD: a classifier trained by Opacus with differential privacy, on fastrnn's engine (extra [privacy]).

python examples/private_classifier.py

The sentences are made up of two vocabularies that overlap; what is to be learnt is which of the two it was.
"""

import argparse
import warnings

import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn

import fastrnn
import fastrnn.opacus  # tells Opacus of fastrnn's modules


class Classifier(nn.Module):
    def __init__(self, words, size):
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.lstm = fastrnn.LSTM(size, size, batch_first=True)
        self.head = nn.Linear(size, 2)

    def forward(self, tokens, lengths):
        _, (h, _) = self.lstm(self.embedding(tokens), lengths=lengths)
        return self.head(h[0])


def sentences(count, words, steps):
    """Tokens (count, T), lengths and labels: label 0 draws from the lower two thirds of the words, 1 from the upper."""
    labels = torch.randint(2, (count,))
    tokens = torch.randint(2 * words // 3, (count, steps)) + (words - 2 * words // 3) * labels[:, None]
    return tokens, torch.randint(4, steps + 1, (count,)), labels


def accuracy(model, tokens, lengths, labels):
    model.eval()
    with torch.no_grad():
        return (model(tokens, lengths).argmax(1) == labels).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--noise", type=float, default=0.8, help="standard deviation, in norms of clipped gradients")
    parser.add_argument("--delta", type=float, default=1e-4)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    train, test = sentences(args.examples, 60, 20), sentences(500, 60, 20)
    model = ModuleValidator.fix(Classifier(60, args.size))  # fastrnn.LSTM becomes fastrnn.opacus.DPLSTM
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), batch_size=64),
        noise_multiplier=args.noise,
        max_grad_norm=1.0,
    )
    for epoch in range(args.epochs):
        model.train()
        for tokens, lengths, labels in loader:  # drawn by Poisson sampling: batches vary in size
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens, lengths), labels).backward()
            optimizer.step()
        right, epsilon = accuracy(model, *test), engine.get_epsilon(args.delta)
        print(f"epoch {epoch + 1}: test accuracy {right:.1%}, ({epsilon:.2f}, {args.delta:g})-differentially private")
    return {"accuracy": right, "epsilon": epsilon}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Secure RNG turned off|Full backward hook is firing|Optimal order is the")
    main()

"""The LSTM classifier of the tutorials, unchanged but for one import: `fastrnn.LSTM` for `nn.LSTM`.

python examples/lstm_classifier.py                       # docstrings of Python's library, by package
python examples/lstm_classifier.py aclImdb.tar.gz        # IMDB
python examples/lstm_classifier.py aclImdb.tar.gz torch  # the same with torch.nn.LSTM

Needs the extra [train], for reading the data alone.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.text.data.records import load_examples
from fastrnn.text.data.segment import Segmenter
from fastrnn.text.data.tokens import Vocabulary


class LSTMClassifier(nn.Module):
    def __init__(self, vocab_size, classes, library=fastrnn, embedding_dim=100, hidden_dim=256, dropout=0.5):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.rnn = library.LSTM(
            embedding_dim, hidden_dim, num_layers=2, bidirectional=True, dropout=dropout, batch_first=True
        )
        self.fc = nn.Linear(2 * hidden_dim, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, text, lengths):
        embedded = self.dropout(self.embedding(text))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.rnn(packed)
        hidden = self.dropout(torch.cat((hidden[-2], hidden[-1]), dim=1))
        return self.fc(hidden)


def batches(texts, labels, size, generator=None):
    order = torch.randperm(len(texts), generator=generator) if generator is not None else torch.arange(len(texts))
    for chosen in order.split(size):
        lengths = torch.tensor([len(texts[i]) for i in chosen])
        text = nn.utils.rnn.pad_sequence([texts[i] for i in chosen], batch_first=True)
        yield text, lengths, labels[chosen]


def train(model, data, epochs=2, batch_size=64, lr=1e-3, seed=1, report=print):
    """Returns the accuracy on the test texts after each epoch."""
    optimizer, loss_of = torch.optim.Adam(model.parameters(), lr=lr), nn.CrossEntropyLoss()
    generator, accuracies = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs):
        model.train()
        start, tokens = time.perf_counter(), 0
        for text, lengths, labels in batches(*data["train"], batch_size, generator):
            optimizer.zero_grad()
            loss = loss_of(model(text, lengths), labels)
            loss.backward()
            optimizer.step()
            tokens += int(lengths.sum())
        rate = tokens / (time.perf_counter() - start)
        model.eval()
        with torch.no_grad():
            hits = [
                (model(text, lengths).argmax(1) == labels).sum().item()
                for text, lengths, labels in batches(*data["test"], batch_size)
            ]
        accuracies.append(sum(hits) / len(data["test"][1]))
        report(f"epoch {epoch + 1}: loss {loss.item():.4f}, test accuracy {accuracies[-1]:.2%}, {rate:,.0f} tokens/s")
    return accuracies


def load(path, max_length=400):
    """{"train": (texts, labels), "test": ...}, the size of the vocabulary and the number of classes."""
    _, splits = load_examples(path)
    names = sorted({example.label for example in splits["train"]})
    text = "\n".join(example.content.replace("\n", " ") for example in splits["train"])
    vocabulary = Vocabulary.build(text, "word", 25_000, Segmenter("split", lower=True))
    data = {}
    for split in ("train", "test"):
        ids = vocabulary.encode_all(example.content for example in splits[split])
        labels = torch.tensor([names.index(example.label) for example in splits[split]])
        data[split] = [i[:max_length] for i in ids], labels
    return data, len(vocabulary), len(names)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="folder or archive of SPLIT/LABEL/*.txt, or a table")
    parser.add_argument("library", nargs="?", choices=["fastrnn", "torch"], default="fastrnn")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=400, help="words of a text that are read")
    args = parser.parse_args(argv)
    data, vocab_size, classes = load(args.data, args.max_length)
    torch.manual_seed(1)
    model = LSTMClassifier(vocab_size, classes, nn if args.library == "torch" else fastrnn)
    return {"accuracy": train(model, data, args.epochs, args.batch_size)[-1], "classes": classes}


if __name__ == "__main__":
    main()

"""Sequence to sequence with attention: dates as people write them to ISO dates, or pairs of your own.

python examples/translation.py
python examples/translation.py --data pairs.tsv      # source, tab, target on each line

`fastrnn train translate` does the same with words and subwords, beam search, BLEU and checkpoints.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import fastrnn
from fastrnn.text.data.dates import date_pairs

PAD, BEGIN, END = 0, 1, 2


class Translator(nn.Module):
    def __init__(self, symbols, size):
        super().__init__()
        self.embedding = nn.Embedding(symbols, size)
        self.encoder = fastrnn.GRU(size, size // 2, bidirectional=True)
        self.decoder = fastrnn.GRU(size, size)
        self.query = nn.Linear(size, size, bias=False)
        self.combine = nn.Linear(2 * size, size)
        self.output = nn.Linear(size, symbols)

    def encode(self, source, lengths):
        """source (S, B) to the memory (S, B, N) and the decoder's first state (1, B, N)."""
        memory, h = self.encoder(self.embedding(source), lengths=lengths)
        return memory, torch.cat((h[0], h[1]), -1).unsqueeze(0)

    def decode(self, target, state, memory, lengths):
        """target (T, B), what has been written so far, to logits (T, B, V) of what comes next."""
        y, state = self.decoder(self.embedding(target), state)
        scores = torch.einsum("tbn,sbn->bts", self.query(y), memory)
        beyond = torch.arange(memory.shape[0]) >= lengths[:, None]
        weights = scores.masked_fill(beyond[:, None], -torch.inf).softmax(-1)
        context = torch.einsum("bts,sbn->tbn", weights, memory)
        return self.output(self.combine(torch.cat((y, context), -1)).tanh()), state

    @torch.no_grad()
    def translate(self, source, lengths, limit=40):
        """The likeliest symbol at each step: a list of ids for each column of source."""
        memory, state = self.encode(source, lengths)
        symbol, written = torch.full((1, source.shape[1]), BEGIN), []
        for _ in range(limit):
            logits, state = self.decode(symbol, state, memory, lengths)
            symbol = logits.argmax(-1)
            written.append(symbol[0])
        columns = torch.stack(written).t().tolist()
        return [column[: column.index(END)] if END in column else column for column in columns]


def batch_of(pairs, number):
    """Padded source (S, B), its lengths (B,) and padded target (T, B), with its begin and its end."""
    sources = [torch.tensor([number[c] for c in source]) for source, _ in pairs]
    targets = [torch.tensor([BEGIN, *(number[c] for c in target), END]) for _, target in pairs]
    return pad_sequence(sources), torch.tensor([len(s) for s in sources]), pad_sequence(targets)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    pairs = [tuple(row.split("\t")[:2]) for row in args.data.read_text().splitlines()] if args.data else date_pairs()
    train, held_out = pairs[:-100], pairs[-100:]
    symbols = sorted({c for pair in pairs for text in pair for c in text})
    number = {c: END + 1 + i for i, c in enumerate(symbols)}
    model = Translator(END + 1 + len(symbols), args.size)
    optimizer, losses = torch.optim.Adam(model.parameters(), args.lr), []
    for step in range(args.steps):
        chosen = [train[i] for i in torch.randint(len(train), (args.batch,))]
        source, lengths, target = batch_of(chosen, number)
        memory, state = model.encode(source, lengths)
        logits, _ = model.decode(target[:-1], state, memory, lengths)
        loss = cross_entropy(logits.flatten(0, 1), target[1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    source, lengths, _ = batch_of(held_out, number)
    written = ["".join(symbols[i - END - 1] for i in ids) for ids in model.translate(source, lengths)]
    right = sum(a == target for a, (_, target) in zip(written, held_out, strict=True)) / len(held_out)
    for (text, target), a in list(zip(held_out, written, strict=True))[:5]:
        print(f"{text!r} -> {a!r}" + ("" if a == target else f", should be {target!r}"))
    print(f"{right:.0%} of {len(held_out)} held-out pairs are right in every character")
    return {"first": losses[0], "last": losses[-1], "right": right}


if __name__ == "__main__":
    main()

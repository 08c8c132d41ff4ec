"""A character language model in plain PyTorch: the state is carried from window to window, the graph is not.

python examples/language_model.py                                    # on the text that Python's help() carries
python examples/language_model.py --data book.txt --steps 2000

`fastrnn train lm` does the same with splits, checkpoints, schedules and reports.
"""

import argparse
import math
import pydoc_data.topics
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastrnn


class LanguageModel(nn.Module):
    def __init__(self, vocabulary, size, layers):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.rnn = fastrnn.LSTM(size, size, layers)
        self.output = nn.Linear(size, vocabulary)
        self.output.weight = self.embedding.weight  # tied

    def forward(self, tokens, state=None):
        """tokens (T, B) and the state before them, to logits (T, B, V) and the state after them."""
        y, state = self.rnn(self.embedding(tokens), state)
        return self.output(y), state


def windows(ids, batch, bptt):
    """Endless (tokens, next tokens, first of an epoch?): `batch` columns of the text, read side by side.

    abcdefghijkl in 2 columns:  a g      windows of 2:  a g | c i | e k
                                b h                     b h | d j |
                                ...
    """
    columns = ids[: len(ids) // batch * batch].view(batch, -1).t().contiguous()
    while True:
        for start in range(0, len(columns) - 1 - bptt, bptt):
            yield columns[start : start + bptt], columns[start + 1 : start + 1 + bptt], start == 0


def train(model, ids, args):
    """The mean loss of the last tenth of the steps, in nats per character."""
    optimizer, state, losses = torch.optim.Adam(model.parameters(), args.lr), None, []
    for step, (tokens, targets, first) in zip(range(args.steps), windows(ids, args.batch, args.bptt), strict=False):
        state = None if first else tuple(s.detach() for s in state)
        logits, state = model(tokens, state)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {loss.item():.3f} nats, {loss.item() / math.log(2):.3f} bits per character")
    return sum(losses[-max(1, args.steps // 10) :]) / max(1, args.steps // 10)


@torch.no_grad()
def sample(model, prompt, length, temperature):
    """`length` token ids that follow those of `prompt`, one step at a time."""
    drawn, tokens, state = [], torch.tensor(prompt).unsqueeze(1), None
    for _ in range(length):
        logits, state = model(tokens, state)
        tokens = torch.multinomial((logits[-1] / temperature).softmax(-1), 1)
        drawn.append(tokens.item())
    return drawn


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bptt", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--sample", type=int, default=300, help="characters to draw at the end")
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    text = args.data.read_text() if args.data else "\n".join(pydoc_data.topics.topics.values())
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([number[c] for c in text])
    frequency = torch.bincount(ids) / len(ids)
    model = LanguageModel(len(characters), args.size, args.layers)
    loss = train(model, ids, args)
    unigram = -(frequency * frequency.log()).nansum().item()
    print(f"{loss:.3f} nats per character; {unigram:.3f} if characters did not depend on one another")
    print("".join(characters[i] for i in sample(model, ids[:20].tolist(), args.sample, 0.7)))
    return {"loss": loss, "unigram": unigram}


if __name__ == "__main__":
    main()

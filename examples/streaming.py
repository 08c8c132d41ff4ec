"""Keyword spotting on a stream: a GRU trained on whole sequences hears one frame at a time, its state carried along.

python examples/streaming.py

The "sound" is made up: a frame is one of eight phones in noise, the keyword is four phones in a row, each two to four
frames long. What is shown is how a model is run step by step, and that this gives the outputs of the whole sequence.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import fastrnn

PHONES, FEATURES, KEYWORD = 8, 16, (3, 1, 4, 5)


class Spotter(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.rnn = fastrnn.GRU(FEATURES, size, num_layers=2)
        self.head = nn.Linear(size, 1)

    def forward(self, frames, state=None):
        """frames (T, B, F) and the state before them, to logits (T, B) and the state after them."""
        y, state = self.rnn(frames, state)
        return self.head(y).squeeze(-1), state


def sounds(voices, batch, steps, noise=0.3):
    """frames (T, B, F) of random phones with keywords among them, and whether one has just been heard, (T, B)."""
    phones = torch.randint(PHONES, (batch, steps))
    heard = torch.zeros(batch, steps)
    for row in range(batch):
        at = 0
        while at < steps:
            said = KEYWORD if torch.rand(()) < 0.2 else (int(torch.randint(PHONES, ())),)
            for phone in said:
                long = int(torch.randint(2, 5, ()))
                phones[row, at : at + long] = phone
                at += long
            if said is KEYWORD:
                heard[row, at : at + 3] = 1.0  # three frames in which to say so
    frames = voices[phones] + noise * torch.randn(batch, steps, FEATURES)
    return frames.transpose(0, 1).contiguous(), heard.t().contiguous()


def train(model, voices, steps, batch):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        frames, heard = sounds(voices, batch, 100)
        logits, _ = model(frames)
        loss = binary_cross_entropy_with_logits(logits, heard, pos_weight=torch.tensor(5.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    return loss.item()


@torch.inference_mode()
def listen(model, stream):
    """Logits (T,) of a stream (T, F), frame by frame, and the seconds that each frame took."""
    state, logits, seconds = None, [], []
    for frame in stream:
        start = time.perf_counter()
        logit, state = model(frame.view(1, 1, -1), state)
        seconds.append(time.perf_counter() - start)
        logits.append(logit.view(()))
    return torch.stack(logits), torch.tensor(seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=1000, help="of the stream")
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    voices, model = torch.randn(PHONES, FEATURES), Spotter(args.size)
    loss = train(model, voices, args.steps, args.batch)
    frames, heard = sounds(voices, 1, args.frames)
    model.eval()
    logits, seconds = listen(model, frames[:, 0])
    with torch.inference_mode():
        difference = (logits - model(frames)[0][:, 0]).abs().max().item()
    says, truth = logits > 0, heard[:, 0] > 0.5
    wrong = (says != truth).float().mean().item()
    p50, p99 = torch.quantile(seconds, torch.tensor([0.5, 0.99])).tolist()
    print(f"{wrong:.1%} of {args.frames} frames wrong; {truth.float().mean():.1%} follow a keyword")
    print(f"a frame takes {p50 * 1e6:.0f} us (p50), {p99 * 1e6:.0f} us (p99)")
    print(f"largest difference from the whole sequence at once: {difference:.1e}")
    return {"loss": loss, "wrong": wrong, "difference": difference}


if __name__ == "__main__":
    main()

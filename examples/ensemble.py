"""An ensemble trained as one: torch.func stacks the members' weights, vmap(grad) gives every member its own gradient.

python examples/ensemble.py

Each member sees its own resampling of noisy waves and predicts the next value; where the wave is of a kind that
training did not have, the members disagree.
"""

import argparse
import copy
import math

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import fastrnn


class Forecaster(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.rnn = fastrnn.LSTM(1, size)
        self.head = nn.Linear(size, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0])  # x (T, B, 1)


def waves(count, steps, low, high):
    """(T, count, 1): sines whose periods lie between low and high, with noise."""
    period = low + (high - low) * torch.rand(count)
    phase = 2 * math.pi * torch.rand(count)
    t = torch.arange(steps)[:, None]
    return (torch.sin(2 * math.pi * t / period + phase) + 0.05 * torch.randn(steps, count)).unsqueeze(-1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    members = [Forecaster(args.size) for _ in range(args.members)]
    weights, _ = stack_module_state(members)  # each (members, ...)
    shape = copy.deepcopy(members[0]).to("meta")  # the model without its weights

    def loss_of(weights, x):
        return (functional_call(shape, weights, (x[:-1],)) - x[1:]).square().mean()

    gradients = vmap(grad_and_value(loss_of), in_dims=(0, 2))  # x (T, B, members, 1)
    data, batch = waves(256, 60, 10.0, 30.0), 32
    own = torch.randint(data.shape[1], (args.members, data.shape[1]))  # with replacement
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    optimizer, losses = torch.optim.Adam(weights.values(), 1e-2), []
    for step in range(args.steps):
        chosen = own.gather(1, torch.randint(data.shape[1], (args.members, batch)))
        grads, values = gradients({k: w.detach() for k, w in weights.items()}, data[:, chosen.t()])
        for name, w in weights.items():
            w.grad = grads[name]
        optimizer.step()
        losses.append(values.mean().item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: " + " ".join(f"{v:.4f}" for v in values.tolist()))

    @torch.no_grad()
    def disagreement(x):
        """Standard deviation over the members of what they predict last, mean over the waves."""
        out = vmap(lambda w: functional_call(shape, w, (x,)))(weights)
        return out[:, -1].std(0).mean().item()

    known, strange = disagreement(waves(64, 60, 10.0, 30.0)), disagreement(3.0 * waves(64, 60, 3.0, 4.0))
    print(f"the members differ by {known:.4f} on waves as in training, by {strange:.4f} on others")
    return {"first": losses[0], "last": losses[-1], "known": known, "strange": strange}


if __name__ == "__main__":
    main()

"""PPO with a recurrent policy: `resets=` clears its state where an episode ends, so that rollouts are used as they are.

python examples/recurrent_policy.py

The task is one of memory: a cue of +1 or -1 is shown at the first step of an episode; after a corridor of random length
comes a junction, where the action has to be that of the cue. Without memory the mean return is 0, the best is 1.
"""

import argparse

import torch
from torch import nn
from torch.distributions import Categorical

import fastrnn


class Corridors:
    """`count` corridors side by side; a new episode begins by itself where one has ended."""

    def __init__(self, count, longest, generator):
        self.count, self.longest, self.generator = count, longest, generator
        self.cue, self.left = torch.zeros(count), torch.zeros(count, dtype=torch.long)
        self.begin(torch.ones(count, dtype=torch.bool))

    def begin(self, where):
        cue = torch.randint(2, (self.count,), generator=self.generator) * 2.0 - 1.0
        length = torch.randint(2, self.longest + 1, (self.count,), generator=self.generator)
        self.cue, self.left = torch.where(where, cue, self.cue), torch.where(where, length, self.left)
        self.observation = torch.stack((self.cue * where, (self.left == 1).float()), -1)  # (B, 2): cue, junction?

    def step(self, action):
        """action (B,), 0 or 1. Returns reward (B,) and whether the episode is over; `observation` is the next one."""
        over = self.left == 1
        reward = torch.where(over, (action * 2 - 1) * self.cue, 0.0)
        self.left = self.left - 1
        self.begin(over)
        return reward, over


class Policy(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.rnn = fastrnn.GRU(2, size)
        self.head = nn.Linear(size, 3)  # two actions and the value

    def forward(self, observations, state, resets):
        """observations (T, B, 2), state (1, B, H), resets (T, B); the logits, the values and the state after them."""
        y, state = self.rnn(observations, state, resets=resets)
        out = self.head(y)
        return out[..., :2], out[..., 2], state


@torch.no_grad()
def rollout(policy, env, state, begins, steps):
    """Play `steps` steps in every corridor, one call of the policy each."""
    kept = {key: [] for key in ("observation", "begins", "action", "logp", "value", "reward", "over")}
    for _ in range(steps):
        observation = env.observation
        logits, value, state = policy(observation[None], state, begins[None])
        drawn = Categorical(logits=logits[0])
        action = drawn.sample()
        reward, over = env.step(action)
        now = (observation, begins, action, drawn.log_prob(action), value[0], reward, over)
        for key, what in zip(kept, now, strict=True):
            kept[key].append(what)
        begins = over
    played = {key: torch.stack(what) for key, what in kept.items()}
    _, following, _ = policy(env.observation[None], state, begins[None])
    return played, following[0], state, begins


def advantages(played, following, gamma=0.99, lam=0.95):
    """Generalised advantage estimates (T, B); nothing is carried over the end of an episode."""
    found, advantage = [], torch.zeros_like(following)
    for t in reversed(range(len(played["reward"]))):
        goes_on = 1.0 - played["over"][t].float()
        delta = played["reward"][t] + gamma * following * goes_on - played["value"][t]
        advantage = delta + gamma * lam * goes_on * advantage
        following = played["value"][t]
        found.append(advantage)
    return torch.stack(found[::-1])


def improve(policy, optimizer, played, state, advantage, epochs):
    """PPO on the rollout as a whole: the state is made anew from where it began, `resets` where an episode began."""
    target, scaled = advantage + played["value"], (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    for _ in range(epochs):
        logits, value, _ = policy(played["observation"], state, played["begins"])
        now = Categorical(logits=logits)
        ratio = (now.log_prob(played["action"]) - played["logp"]).exp()
        gain = torch.minimum(ratio * scaled, ratio.clamp(0.8, 1.2) * scaled).mean()
        loss = -gain + 0.5 * (value - target).square().mean() - 0.01 * now.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--corridors", type=int, default=64)
    parser.add_argument("--longest", type=int, default=10)
    parser.add_argument("--steps", type=int, default=64, help="of a rollout")
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    policy, env = Policy(args.size), Corridors(args.corridors, args.longest, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    state, begins = torch.zeros(1, args.corridors, args.size), torch.ones(args.corridors, dtype=torch.bool)
    for iteration in range(args.iterations):
        before = state
        played, following, state, begins = rollout(policy, env, state, begins, args.steps)
        improve(policy, optimizer, played, before, advantages(played, following), epochs=4)
        mean = (played["reward"].sum() / played["over"].sum()).item()
        if (iteration + 1) % 10 == 0:
            print(f"iteration {iteration + 1}: mean return {mean:+.3f} of {int(played['over'].sum())} episodes")
    return {"return": mean}


if __name__ == "__main__":
    main()

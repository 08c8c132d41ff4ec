"""Beam search over a Seq2Seq, many sources at once."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .models.seq2seq import Seq2Seq, select_state


@dataclasses.dataclass
class Hypothesis:
    """Target tokens without `end`; `score`, the sum of their log-probabilities and of end's, over length ** penalty."""

    tokens: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    model: Seq2Seq, source: Tensor, lengths: Tensor, beam: int, limit: int, penalty: float, banned: int | None = None
) -> list[Hypothesis]:
    """The best hypothesis found for each column of source (S, B), of at most `limit` tokens.

    The `beam` likeliest unfinished hypotheses are kept; a source is done when `beam` of its hypotheses have ended. The
    one of the highest score wins. `banned` is a token never chosen (the unknown one). With beam 1 it is the likeliest
    token at each step.
    """
    count, device = source.shape[1], source.device
    memory, state = model.encode(source, lengths)
    rows = torch.arange(count, device=device).repeat_interleave(beam)
    memory, state = memory.select(rows), select_state(state, rows)
    tokens = torch.full((1, count * beam), model.begin, device=device)
    scores = torch.full((count, beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # at first all rows of a source are the same
    prefixes: list[list[list[int]]] = [[[] for _ in range(beam)] for _ in range(count)]
    ended: list[list[Hypothesis]] = [[] for _ in range(count)]
    for length in range(1, limit + 2):
        logits, state, _ = model.decode(tokens, state, memory)
        logp = logits[0].float().log_softmax(1)
        if banned is not None:
            logp[:, banned] = -torch.inf
        if length > limit:  # no more tokens: every hypothesis ends here
            logp[:, : model.end] = -torch.inf
        choices = logp.shape[1]
        totals = (scores.unsqueeze(2) + logp.view(count, beam, choices)).view(count, -1)
        best, index = totals.topk(min(2 * beam, totals.shape[1]), dim=1)
        parents, chosen = [], []
        for b, (values, places) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
            candidates = [(*divmod(place, choices), value) for value, place in zip(values, places, strict=True)]
            kept, ending = choose(candidates, beam, model.end)
            for row, value in ending[: beam - len(ended[b])]:
                ended[b].append(Hypothesis(prefixes[b][row], value / length**penalty))
            prefixes[b] = [[*prefixes[b][row], token] for row, token, _ in kept]
            scores[b] = torch.tensor([value for *_, value in kept], device=device)
            parents += [b * beam + row for row, *_ in kept]
            chosen += [token for _, token, _ in kept]
        if all(len(found) >= beam for found in ended):
            break
        tokens = torch.tensor([chosen], device=device)
        state = select_state(state, torch.tensor(parents, device=device))
    return [max(found, key=lambda h: h.score) for found in ended]


def choose(
    candidates: list[tuple[int, int, float]], beam: int, end: int
) -> tuple[list[tuple[int, int, float]], list[tuple[int, float]]]:
    """Of one source's candidates (row, token, score), best first: the `beam` that go on, filled up with impossible
    ones, and the (row, score) of those among the best `beam` that end."""
    possible = [candidate for candidate in candidates if candidate[2] > -torch.inf]
    kept = [candidate for candidate in possible if candidate[1] != end][:beam]
    ending = [(row, score) for row, token, score in possible[:beam] if token == end]
    return kept + [(0, 0, -torch.inf)] * (beam - len(kept)), ending

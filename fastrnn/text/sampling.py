"""Text from a language model, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .config.run import SEEDS
from .data.tokens import Vocabulary
from .errors import UserError
from .models.lm import LanguageModel


@torch.inference_mode()
def generate(
    model: LanguageModel,
    vocabulary: Vocabulary,
    prompt: str = "",
    length: int = 400,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> str:
    """`prompt` and `length` further tokens drawn from `model`; the same seed gives the same text.

    Args:
        temperature: below 1 keeps to the likely; 0 takes the likeliest token every time.
        top_k: draw among the k likeliest tokens only; 0: all.
        top_p: draw among the likeliest tokens whose probabilities sum to p; 1: all.

    `<unk>` is never drawn. Raises UserError for values out of range.
    """
    if length < 0 or top_k < 0 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"--length, --top-k and --temperature must be at least 0 and --top-p in (0, 1], "
            f"got {length}, {top_k}, {temperature}, {top_p}"
        )
    if seed is not None and not 0 <= seed < SEEDS:
        raise UserError(f"--seed must lie in [0, {SEEDS}), got {seed}")
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    model.eval()
    given = vocabulary.encode(prompt).tolist()
    ids = list(given)
    tokens, state = torch.tensor(given or [vocabulary.start()]).unsqueeze(1), None  # (T, 1)
    for _ in range(length):
        logits, state = model(tokens, state)
        scores = logits[-1, 0].float()
        if vocabulary.unknown is not None:
            scores[vocabulary.unknown] = -torch.inf
        ids.append(draw(scores, temperature, top_k, top_p, generator))
        tokens = torch.tensor([[ids[-1]]])
    return prompt + vocabulary.segmenter.join(vocabulary.decode(ids)[len(vocabulary.decode(given)) :])


def draw(scores: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """A token id from the logits `scores` (V,)."""
    if temperature == 0:
        return int(scores.argmax())
    scores = scores / temperature
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    probabilities = scores.softmax(0)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= top_p  # the first token always stays
        probabilities = probabilities.index_fill(0, index[beyond], 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))

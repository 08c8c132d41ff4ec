"""The step time of one model with fastrnn's layers and with torch.nn's, measured in one process, interleaved."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LmConfig
from .data.stream import BpttLoader
from .models.lm import LanguageModel, detach


def compare_layers(model: LanguageModel, config: LmConfig, ids: Tensor, steps: int) -> dict[str, float]:
    """Median milliseconds of a training step (forward, backward, clip, SGD) by layer: {"fastrnn": ms, "torch": ms}.

    Both models start from the weights of `model` and see the same batches of the stream `ids`, the state carried.
    """
    vocab_size = model.embedding.num_embeddings
    models = {}
    for layer in ("fastrnn", "torch"):
        models[layer] = LanguageModel(dataclasses.replace(config, layer=layer), vocab_size)
        models[layer].load_state_dict(model.state_dict())
    optimizers = {layer: torch.optim.SGD(m.parameters(), lr=1e-3) for layer, m in models.items()}
    times: dict[str, list[float]] = {layer: [] for layer in models}
    states = dict.fromkeys(models)
    loader = BpttLoader(ids, config.batch_size, config.bptt)
    batches = list(itertools.islice(loader, steps + 2))
    for step in range(steps + 2):
        tokens, targets = batches[step % len(batches)]
        order = list(models) if step % 2 == 0 else list(models)[::-1]
        for layer in order:
            start = time.perf_counter()
            logits, state = models[layer](tokens, states[layer])
            torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
            torch.nn.utils.clip_grad_norm_(models[layer].parameters(), config.clip or 1.0)
            optimizers[layer].step()
            optimizers[layer].zero_grad()
            states[layer] = detach(state)
            if step >= 2:  # the first steps allocate and pack
                times[layer].append(time.perf_counter() - start)
    return {layer: 1e3 * statistics.median(t) for layer, t in times.items()}

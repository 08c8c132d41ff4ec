"""Training by several processes on one machine: DistributedDataParallel over gloo, each process its own batch.

The model is a two-layer LSTM with a linear layer, fp32; a step is forward, backward with the gradients' mean over the
processes, and SGD. Every process has the same number of threads, in the run with one process too, and the same batch:
`efficiency` is the tokens per second of N processes over N times those of one. torch.nn's LSTM and fastrnn's take their
steps in turn in the same processes, after a gate: losses and averaged gradients are the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench import parity, report
from fastrnn.bench.environment import Store, cores, results, slug
from fastrnn.bench.environment import describe as environment_of
from fastrnn.bench.measure import compare_all
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]
T, B, H, LAYERS, OUT = 35, 20, 200, 2, 500
ROUNDS = 20


class Model(nn.Module):
    """x (T, B, H) -> logits (T * B, OUT)."""

    def __init__(self, library: Any, width: int, out: int) -> None:
        super().__init__()
        self.rnn = library.LSTM(width, width, LAYERS)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.rnn(x)[0].flatten(0, 1))
        return y


def step_of(model: nn.Module, x: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """A training step, which returns the loss; `model.parameters()` keep their gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def process(rank: int, world: int, folder: str, threads: int, width: int, rounds: int) -> None:
    """One of `world` processes; the first one leaves its record in `folder`."""
    torch.set_num_threads(threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world
    )
    try:
        torch.manual_seed(0)
        source = Model(nn, width, OUT)
        torch.manual_seed(rank + 1)
        x, targets = torch.randn(T, B, width), torch.randint(OUT, (T * B,))
        steps: dict[str, Callable[[], Tensor]] = {}
        seen: list[dict[str, Tensor]] = []
        for name, library in (("torch.nn", nn), ("fastrnn", fastrnn)):
            model = Model(library, width, OUT)
            model.load_state_dict(source.state_dict())
            steps[name] = step_of(nn.parallel.DistributedDataParallel(model), x, targets)
            loss = steps[name]()
            grads = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
            seen.append({"loss": loss.reshape(1), **grads})
        errors = parity.check(seen[0], seen[1], torch.float32)
        # A fixed number of single steps: all processes must take the same.
        timed = compare_all(steps, 0.0, rounds, sample_seconds=0.0)
        size = sum(p.numel() * p.element_size() for p in source.parameters())
        record = {"parity": max(errors.values()), "bytes": size, "tokens": world * T * B, **timed}
        if rank == 0:
            Path(folder, f"record-{world}.json").write_text(json.dumps(record))
    finally:
        torch.distributed.destroy_process_group()


def measure(world: int, threads: int, width: int = H, rounds: int = ROUNDS) -> Record:
    """The record of `world` processes of `threads` threads each."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (world, folder, threads, width, rounds), world)  # type: ignore[no-untyped-call, attr-defined, unused-ignore]
        record = json.loads(Path(folder, f"record-{world}.json").read_text())
    return {"kind": "ddp", "world": world, "threads": threads, "H": width, **record}


def line(r: Record, alone: Record) -> str:
    """Times of a step, tokens per second, and the efficiency against one process."""
    rates = {side: r["tokens"] / r[side]["p50"] for side in ("baseline", "subject")}
    whole = {side: r["world"] * alone["tokens"] / alone[side]["p50"] for side in rates}
    shares = {side: rates[side] / whole[side] for side in rates}
    texts = [
        f"{name} {report.seconds(r[side]['p50'])}, {rates[side]:.0f} tokens/s, efficiency {shares[side]:.2f}"
        for name, side in (("torch.nn", "baseline"), ("fastrnn", "subject"))
    ]
    ratio = r["ratio"]
    spans = f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    head = f"{r['world']} processes, {r['threads']} threads each, {r['bytes'] / 2**20:.1f} MiB of gradients"
    return f"{head}\n  {texts[0]}\n  {texts[1]}\n  torch.nn / fastrnn {spans}"


def command(args: argparse.Namespace, words: list[str], echo: Callable[[str], None]) -> int:
    """One process, then args.ddp of them, with as many threads each as fit."""
    if args.ddp < 2:
        raise UsageError(f"--ddp: expected at least 2 processes, got {args.ddp}")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise UsageError("--ddp: this torch has no gloo")
    environment = {**environment_of(fastrnn, words), "malloc": "system", "device": "cpu"}
    path = results(args.out) / slug(environment) / f"ddp-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.jsonl"
    store = Store(path if args.save else None)
    store.add(environment)
    echo(report.header(environment) + "\n")
    threads = max(1, cores() // args.ddp)
    for world in (1, args.ddp):
        store.add(measure(world, threads))
        echo(line(store.records[-1], store.records[1]))
    if args.save:
        echo(f"saved: {path}")
    return 0

"""`python -m benchmarks.end_to_end`: training through the harness with fastrnn's layers and with torch.nn's.

The same run twice, but for `--layer`: the same data, first weights and random numbers. What is timed is what a user
waits for: batches, embedding, layers, output and loss, backward, clipping, the optimiser, Lightning's loop. Rounds of
either take turns in one process; the losses of both are compared step by step. It also tells what the layers
take of our time: the rest is torch's on both sides, and no layer could make it faster.

    python -m benchmarks.end_to_end --threads 1 2 shakespeare-char=input.txt imdb=aclImdb.tar.xz

A run is a preset and the data to train it on; `shakespeare-char,cell=gru=input.txt` changes an option of the preset.
Without any, the default model of each task on its default data.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile

import fastrnn
from fastrnn.bench.environment import Store, describe, keep_freed_memory, results, slug
from fastrnn.bench.measure import summary
from fastrnn.bench.options import MALLOC_HELP, Parser
from fastrnn.cli import guarded
from fastrnn.cli.parser import UsageError, presets, suggest
from fastrnn.cli.text import TASKS, configured
from fastrnn.text.task import Task
from fastrnn.text.tasks import find_task
from fastrnn.text.training import PRECISION

LAYERS = ("torch", "fastrnn")
OURS = (fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU)
BACKWARD = "_RecurrenceBackward"  # as the profiler names it, with all that it calls
FIXED = ("layer", "data", "device", "devices", "nodes")  # by what this measures
WARM_UP = 3  # steps that are not timed: they allocate and pack


class Watch(L.Callback):
    """The loss of each step, and the time and tokens of those after the warm-up."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.begin = 0.0
        self.start = self.end = (0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.end = time.perf_counter(), task.sitting
        if len(self.losses) == WARM_UP:
            self.start = self.end

    @property
    def tokens_per_s(self) -> float:
        return (self.end[1] - self.start[1]) / (self.end[0] - self.start[0])


def train(kind: type[Task], config: Any, data: Any, steps: int) -> Watch:
    """The first `steps` steps of a run after the warm-up, without validation or checkpoints."""
    data.train.load_state_dict(dict.fromkeys(data.train.state_dict(), 0))  # from the beginning
    torch.manual_seed(config.seed)
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, precision=PRECISION[config.precision], max_steps=WARM_UP + steps,
        limit_val_batches=0, logger=False, callbacks=[watch],
        accumulate_grad_batches=config.accumulate, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no `val_dataloader`")  # on purpose
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", module="lightning")
        warnings.filterwarnings("ignore", ".*does not have many workers")
        trainer.fit(kind(config, data), data.train)
    return watch


def share_of_layers(kind: type[Task], config: Any, data: Any, steps: int) -> float:
    """Of the time of a step with fastrnn's layers, what they take: their calls by the clock, their backward by torch's
    profiler, under which all runs a little slower. With layers that take none, 1 / (1 - share) times as many tokens a
    second would be trained."""
    began: list[float] = []
    calls: list[float] = []

    def before(module: Any, inputs: Any) -> None:
        if isinstance(module, OURS):
            began.append(time.perf_counter())

    def after(module: Any, inputs: Any, outputs: Any) -> None:
        if isinstance(module, OURS):
            calls.append(time.perf_counter() - began.pop())

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
            watch = train(kind, dataclasses.replace(config, layer="fastrnn"), data, steps)
    finally:
        for hook in hooks:
            hook.remove()
    (backward,) = (e.cpu_time_total / 1e6 for e in seen.key_averages() if e.key == BACKWARD)
    return (sum(calls) + backward) / (watch.end[0] - watch.begin)


def configuration(run: str) -> tuple[str, type[Task], Any]:
    """Name, task and configuration of `PRESET[,option=value ...][=data]`, or of the task named so.

    Raises:
        UsageError, UserError: what is wrong, in one line.
    """
    name, *changes = run.split(",")
    data: list[str] = []
    if changes:
        *change, last = changes[-1].split("=", 2)  # of a path that may hold more of them
        changes[-1], data = ("=".join(change), [last]) if len(change) == 2 else (changes[-1], [])
    elif "=" in name:
        name, *data = name.split("=", 1)
    wrong = next((change for change in changes if "=" not in change), None)
    if wrong is not None:
        raise UsageError(f"{run}: expected option=value after a comma, got {wrong}")
    tasks = {preset: task for task in TASKS for preset in presets(task)}
    if name not in (*TASKS, *tasks):
        raise UsageError(f"no preset {name}{suggest(name, tasks)}; there are: {', '.join(sorted(tasks))}")
    task = tasks.get(name, name)
    kind = find_task(task)
    known = {field.name for field in dataclasses.fields(kind.Config)}.difference(FIXED)
    for option in (change.split("=")[0] for change in changes):
        if option.replace("-", "_") not in known:
            raise UsageError(f"{run}: there is no option {option} here{suggest(option, known)}")
    words = [] if name in TASKS else ["--preset", name]
    words += [f"--{change}" for change in changes] + [f"--data={part}" for part in data]
    return ",".join([name, *changes]), kind, configured(task, words)[0]


def measure(run: str, threads: list[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    """A record for each number of threads."""
    name, kind, config = configuration(run)
    data = kind.load(config, None)
    records = []
    for number in threads:
        torch.set_num_threads(number)
        watched: dict[str, list[Watch]] = {layer: [] for layer in LAYERS}
        for _ in range(rounds):
            for layer in LAYERS:
                watched[layer].append(train(kind, dataclasses.replace(config, layer=layer), data, steps))
        rate = {layer: summary([w.tokens_per_s for w in found]) for layer, found in watched.items()}
        pairs = list(zip(*(found[0].losses for found in watched.values()), strict=True))
        records.append({
            "kind": "end_to_end", "run": name, "task": kind.name, "threads": number, "steps": steps, "rounds": rounds,
            "tokens_per_s": rate,
            "ratio": summary([b.tokens_per_s / a.tokens_per_s for a, b in zip(*watched.values(), strict=True)]),
            "share_of_layers": share_of_layers(kind, config, data, steps),
            "last_losses": pairs[-1], "loss_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        })  # fmt: skip
    return records


HEAD = (
    f"{'run':36} threads | tokens/s: torch.nn  fastrnn  ratio (p20-p80); of fastrnn's time in its layers"
    " | loss of the last step; largest difference"
)


def line(r: dict[str, Any]) -> str:
    torch_rate, our_rate = (r["tokens_per_s"][layer]["p50"] for layer in LAYERS)
    ratio, losses = r["ratio"], r["last_losses"]
    return (
        f"{r['run']:36} {r['threads']:7} | {torch_rate:18,.0f} {our_rate:8,.0f}  {ratio['p50']:5.2f} "
        f"({ratio['p20']:.2f}-{ratio['p80']:.2f}) {r['share_of_layers']:4.0%}"
        f" | {losses[0]:.6f} {losses[1]:.6f}; {r['loss_difference']:.1e}"
    )


def parser() -> Parser:
    made = Parser("python -m benchmarks.end_to_end", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    made.add_argument("runs", nargs="*", default=list(TASKS), metavar="PRESET[,option=value ...][=data]")
    made.add_argument("--threads", type=positive, nargs="+", default=[1])
    made.add_argument("--rounds", type=positive, default=3, help="times that each layer has its turn")
    made.add_argument("--steps", type=positive, default=20, help="steps timed in each round")
    made.add_argument("--malloc", choices=("keep", "system"), default="system", help=MALLOC_HELP)
    made.add_argument("--save", action="store_true", help="keep the records")
    made.add_argument("--out", metavar="FOLDER", help="where (benchmarks/results)")
    return made


def positive(word: str) -> int:
    if not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {word}")
    return int(word)


def execute(args: list[str]) -> int:
    given = parser().parse_args(args)
    for run in given.runs:
        configuration(run)  # options that are wrong are told before anything is measured
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    kept = given.malloc == "keep" and keep_freed_memory()
    environment = describe(fastrnn, ["python", "-m", "benchmarks.end_to_end", *args])
    environment["malloc"] = "keep" if kept else "system"
    day = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = results(given.out) / slug(environment) / f"end-to-end-{day}.jsonl" if given.save else None
    store = Store(path)
    store.add(environment)
    print(HEAD)
    for run in given.runs:
        for record in measure(run, given.threads, given.rounds, given.steps):
            store.add(record)
            print(line(record), flush=True)
    if path:
        print(f"records: {path}")
    return 0


def main(args: list[str] | None = None) -> int:
    words = sys.argv[1:] if args is None else args
    return guarded("python -m benchmarks.end_to_end", lambda: execute(words))


if __name__ == "__main__":
    sys.exit(main())

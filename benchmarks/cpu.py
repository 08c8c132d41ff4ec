"""fastrnn against torch.nn on the CPU: `python -m benchmarks.cpu`, about twelve minutes for everything.

Both sides run in this process on the same weights and inputs, in turn. Nothing is timed before both
gave the same numbers; a case that differs is reported as failed, and the run then exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from benchmarks import memory, parity, report
from benchmarks.environment import ROOT, Store, describe, keep_freed_memory, slug, write
from benchmarks.measure import compare, gemm_rate
from benchmarks.shapes import CASES, CELLS, MODES, Case, matching
from benchmarks.subjects import Subject, pair

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
MALLOC_HELP = (
    "keep: freed memory stays with the process, for both sides alike; system: the C library's own rules, by which "
    "a module may or may not map fresh pages at every call, depending on where its blocks happen to lie (system)"
)
LARGE_BATCH = 16  # from here on the share of the matrix product's rate is reported


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", nargs="+", default=[], metavar="PART", help="cases whose name contains one of these")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of samples per measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per measurement at least (%(default)s)")
    parser.add_argument("--backend", choices=("auto", "cpu", "native", "reference"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--memory", choices=("yes", "no", "only"), default="yes", help="peak memory of training")
    parser.add_argument("--malloc", choices=("keep", "system"), default="system", help=MALLOC_HELP)
    parser.add_argument("--self", action="store_true", help="torch.nn against itself: the noise of this machine")
    parser.add_argument(
        "--save", action="store_true", help="keep the records and tables in benchmarks/results/<hardware>/"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args(argv)
    if not matching(args.cases):
        parser.error(f"no case's name contains any of {args.cases}; see --list")
    return args


@contextlib.contextmanager
def settings(library: ModuleType, backend: str, mode: str, threads: int) -> Iterator[None]:
    """torch's threads, autograd's mode and fastrnn's backend, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with contextlib.ExitStack() as stack:
            if library is not torch.nn:
                stack.enter_context(library.backend(backend))
            if mode == "inference":
                stack.enter_context(torch.inference_mode())
            yield
    finally:
        torch.set_num_threads(before)


def measure(
    case: Case, cell: str, mode: str, threads: int, library: ModuleType, args: argparse.Namespace
) -> dict[str, Any]:
    """One measurement behind its parity gate; parity.Mismatch when the sides differ."""
    dtype = DTYPES[args.dtype]
    with settings(library, args.backend, mode, threads):
        baseline, subject = pair(case, cell, mode, dtype, library)
        errors = parity.check(baseline.observe(), subject.observe(), dtype)
        chosen = _chosen(library, subject)
        gemm = gemm_rate(dtype) if case.B >= LARGE_BATCH else None
        times = compare(baseline.iterate, subject.iterate, args.budget, args.rounds)
    return {
        "kind": "measurement",
        **_key(case, cell, mode, threads),
        "dtype": args.dtype,
        "backend": args.backend,
        "chosen": chosen,
        "parity": max(errors.values()),
        "flops": case.flops(cell, mode),
        "gemm": gemm,
        **times,
    }


def _chosen(library: ModuleType, subject: Subject) -> str:
    """The backend that the subject's first layer runs on."""
    if library is torch.nn:
        return "torch.nn"
    with contextlib.redirect_stdout(io.StringIO()):
        return str(library.explain(subject.module, *subject.arguments, **subject.keywords).backend.name)


def measure_memory(
    case: Case, cell: str, threads: int, library: ModuleType, args: argparse.Namespace
) -> dict[str, Any]:
    """Peak memory of both sides in training."""
    dtype = DTYPES[args.dtype]
    sides = [memory.peak(case, cell, dtype, name, args.backend, threads) for name in ("torch.nn", library.__name__)]
    return {"kind": "memory", **_key(case, cell, "training", threads), "baseline": sides[0], "subject": sides[1]}


def _key(case: Case, cell: str, mode: str, threads: int) -> dict[str, Any]:
    return {"case": case.name, "cell": cell, "mode": mode, "threads": threads}


def _failure(what: str, error: Exception, key: dict[str, Any]) -> dict[str, Any]:
    record = {"kind": "failure", "what": what, **key, "message": f"{type(error).__name__}: {error}"}
    print(report.failure_line(record), flush=True)
    return record


def run_times(store: Store, library: ModuleType, args: argparse.Namespace) -> None:
    """The table of times, a line as soon as it is known."""
    print(report.TIMES_HEADER, flush=True)
    for threads in args.threads:
        for case in matching(args.cases):
            for cell in (c for c in args.cells if c in case.cells):
                for mode in (m for m in args.modes if m in case.modes):
                    try:
                        record = measure(case, cell, mode, threads, library, args)
                    except Exception as error:  # one case must not end the run; the exit status tells
                        record = _failure("timing", error, _key(case, cell, mode, threads))
                    else:
                        print(report.time_line(record), flush=True)
                    store.add(record)


def run_memory(store: Store, library: ModuleType, args: argparse.Namespace) -> None:
    """The peak memory of every case in training, at the largest thread count."""
    why_not = memory.unavailable()
    if why_not is not None:
        print(f"peak memory is not measured: {why_not}")
        store.add({"kind": "note", "message": f"peak memory is not measured: {why_not}"})
        return
    threads = max(args.threads)
    for case in (c for c in matching(args.cases) if "training" in c.modes):
        for cell in (c for c in args.cells if c in case.cells):
            try:
                store.add(measure_memory(case, cell, threads, library, args))
            except Exception as error:  # as above
                store.add(_failure("memory", error, _key(case, cell, "training", threads)))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print("\n".join(case.name for case in CASES))
        return 0
    kept = args.malloc == "keep" and keep_freed_memory()
    library = torch.nn if args.self else import_module("fastrnn")
    environment = {**describe(library), "malloc": "keep" if kept else "system"}
    target = ROOT / "results" / slug(environment) / f"cpu-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.jsonl"
    store = Store(target if args.save else None)
    store.add(environment)
    print(report.header(environment), end="\n\n", flush=True)
    if args.memory != "only":
        run_times(store, library, args)
    if args.memory != "no" and "training" in args.modes:
        run_memory(store, library, args)
    print("\n" + report.summarise(store.records))
    if args.save:
        write(target.with_suffix(".txt"), report.full(store.records))
        print(f"\nsaved: {target.relative_to(ROOT.parent)} and .txt")
    return 1 if any(r["kind"] == "failure" for r in store.records) else 0


if __name__ == "__main__":
    sys.exit(main())

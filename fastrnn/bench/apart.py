"""A function in a process of its own, which has measured nothing before.

What a process has done before changes how fast it is: where its memory lies, which blocks its allocator keeps or gives
back (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

PRELOADED = ["fastrnn.bench.measuring", "fastrnn.bench.memory", "fastrnn"]


class Apart(RuntimeError):
    """An error of the other process; its message begins with the type."""


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns there; it, the arguments and the answer are pickled.

    Raises:
        Apart: it raised, or the process ended without an answer.
    """
    # Children of a server that has only imported: nothing of this process goes along, and no pool of threads is forked.
    # Elsewhere what torch has imported need not outlive a fork.
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    try:
        with _nothing_as_main():
            process.start()
        sender.close()
        good, answer = receiver.recv()
    except EOFError:
        process.join()
        raise Apart(f"the measuring process ended with exit code {process.exitcode}, without an answer") from None
    finally:
        if process.pid is not None:
            process.terminate()  # where this one was interrupted; else it has answered, and ends anyway
            process.join()
        receiver.close()
    if not good:
        raise Apart(answer)
    return answer


@contextlib.contextmanager
def _nothing_as_main() -> Iterator[None]:
    """A child imports its parent's main module, which for a script means to run it; nothing of it is needed there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    try:
        answer = True, function(*arguments)
    except Exception as error:  # carried to the parent, which raises it
        answer = False, f"{type(error).__name__}: {error}"
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        sender.send(answer)

"""A function in a process of its own, which has measured nothing before.

What a process has done before changes how fast it is: where its memory lies, which blocks its allocator keeps or gives
back. After many cases torch.nn trained some shapes half as fast as in a fresh process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["fastrnn.bench.measuring", "fastrnn.bench.memory", "fastrnn"]


class Apart(RuntimeError):
    """An error of the other process, by its type and message."""


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns there; it, the arguments and the answer are pickled.

    Raises:
        Apart: it raised, or the process ended without an answer.
    """
    # Children of a server that has only imported: nothing of this process goes along, and no pool of threads is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        good, answer = receiver.recv()
    except EOFError:
        process.join()
        raise Apart(f"the measuring process ended with exit code {process.exitcode}, without an answer") from None
    process.join()
    if not good:
        raise Apart(answer)
    return answer


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:  # carried to the parent, which raises it
        sender.send((False, f"{type(error).__name__}: {error}"))

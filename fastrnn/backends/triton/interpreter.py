"""All programs of a grid at once in Triton's interpreter, which runs one after another: for kernels with barriers.

Each program has a thread, and `program_id` is a thread's own. Only the interpreter itself is changed, and only its
notion of where in the grid it is.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from typing import Any

from triton.runtime import interpreter

PATIENCE = 120.0  # seconds for one program
_here = threading.local()


def _place(builder: Any) -> Any:
    return getattr(_here, "place", None)


def _move(builder: Any, place: Any) -> None:
    _here.place = place


interpreter.InterpreterBuilder.grid_idx = property(_place, _move)


class _Programs:
    """In the place of a kernel's function: one call runs its whole grid."""

    def __init__(self, function: Any, grid: tuple[int, int, int]) -> None:
        self.function, self.grid = function, grid
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__annotations__, self.__signature__ = function.__annotations__, inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        builder, errors = interpreter.interpreter_builder, []
        builder.set_grid_dim(*self.grid)

        def program(place: tuple[int, ...]) -> None:
            try:
                builder.set_grid_idx(*place)
                self.function(**arguments)
            except Exception as error:
                errors.append(error)

        places = itertools.product(*map(range, self.grid))
        threads = [threading.Thread(target=program, args=(place,), daemon=True) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive() and not errors:
                raise TimeoutError(f"{self.__name__}: a program of the grid {self.grid} has not ended")
        if errors:
            raise errors[0]


class Together:
    """A kernel whose programs run at the same time."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            before = sys.getswitchinterval()
            sys.setswitchinterval(2e-4)  # a waiting program spends its turn looking
            try:
                programs = _Programs(self.kernel.rewrite(), grid)
                interpreter.GridExecutor(programs, self.kernel.arg_names, (1, 1, 1))(*args, **kwargs)
            finally:
                sys.setswitchinterval(before)

        return launch

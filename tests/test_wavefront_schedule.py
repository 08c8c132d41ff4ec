"""What waits for what, where layers run side by side: on streams that only record (wavefront_support)."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from support import KINDS, leaves
from wavefront_support import CALLER, CHUNK, MASKS, Engine, Hazard, Operations, T, Watched, build, inputs, needs_engine

from fastrnn import backends
from fastrnn.backends import BACKENDS
from fastrnn.wavefront import SETTING
from fastrnn.wavefront import lanes as streams
from fastrnn.wavefront.backward import Layers

pytestmark = needs_engine


def watched(monkeypatch, module: Any, lanes: Watched) -> Engine:
    """`lanes` see what is done in the backend "cpu" and by torch, forward and backward."""
    layers = {getattr(module, f"weight_hh_l{i}").data_ptr(): i for i in range(module.num_layers)}
    engine = Engine(lanes, layers)
    monkeypatch.setitem(BACKENDS, "cpu", engine)
    backends.clear_choices()
    monkeypatch.setattr(streams, "lanes_of", lambda _, n: lanes.begin(n))
    way_back = Layers.backward

    def backward(ctx: Any, *douts: Any) -> Any:
        with Operations(lanes):
            return way_back(ctx, *douts)

    monkeypatch.setattr(Layers, "backward", staticmethod(backward))
    return engine


@contextlib.contextmanager
def scene(kind: str, **options: Any):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SETTING, str(CHUNK))
        yield patch, build(kind, dropout=0.3, **options)
    backends.clear_choices()


def walk(patch: Any, module: Any, lanes: Watched, masks: str = "both", grad: bool = True) -> None:
    watched(patch, module, lanes)
    x, hx = inputs(module)
    with torch.set_grad_enabled(grad), Operations(lanes):
        outs = leaves(module(x, hx, **MASKS[masks]))
        loss = torch.stack([o.sum() for o in outs]).sum()
    if grad:
        grads = torch.autograd.grad(loss, [x, *leaves(hx), *module.parameters()])
        with Operations(lanes):
            torch.stack([g.sum() for g in grads])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("save", ["gates", "states"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dependence_has_its_wait(kind, save, grad):
    for layers, masks in ((2, "both"), (6, "dense")):  # and more layers than there are streams for
        with scene(kind, save=save, layers=layers) as (patch, module):
            lanes = Watched()
            walk(patch, module, lanes, masks, grad)
            assert len(lanes.tasks) == layers * -(-T // CHUNK) * (1 + grad)


@pytest.mark.parametrize("kind", ["gru", "lstm_proj"])
def test_a_missing_wait_is_found(kind):
    with scene(kind, layers=2) as (patch, module):
        lanes = Watched()
        walk(patch, module, lanes, "dense")
    assert lanes.waits.count("task") == 2 * (3 * 2 + 4), "on both ways, of the chunk before and the layer beneath"
    found = []
    for i, sort in enumerate(lanes.waits):
        with scene(kind, layers=2) as (patch, module):
            try:
                walk(patch, module, Watched(without=i), "dense")
            except Hazard:
                found.append(i)
                continue
        assert sort != "task", f"wait {i} of {len(lanes.waits)}"
    # A lane whose first task waits for another needs no fork, one that others go on from no join: what is there
    # for them is there for errors, too.
    assert {lanes.waits[i] for i in found} == {"fork", "join", "task"}


def test_memory_freed_too_early_is_found():
    for grad in (True, False):
        with scene("lstm") as (patch, module), pytest.raises(Hazard, match="may be freed"):
            walk(patch, module, Watched(keeps=False), grad=grad)


class Failure(Exception):
    pass


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_after_an_error_the_caller_still_waits_for_every_lane(monkeypatch, way):
    """What is under way uses the memory of the caller, who may free it as the error passes."""
    method = "forward_after" if way == "forward" else "backward"
    plain, calls = getattr(Engine, method), []

    def fails(self, call: Any, *rest: Any, **options: Any) -> Any:
        result = plain(self, call, *rest, **options)
        calls.append(self.lanes.now)
        if len(calls) == 6:  # on the third diagonal: others have begun, and none is through
            raise Failure
        return result

    monkeypatch.setattr(Engine, method, fails)
    with scene("lstm") as (patch, module):
        lanes = Watched()
        with pytest.raises(Failure):
            walk(patch, module, lanes)
    assert lanes.now == CALLER
    known = lanes.clocks[CALLER]
    assert len(set(calls)) > 3, "several lanes are at work"
    for lane in set(calls):
        assert known.get(lane, 0) == lanes.clocks[lane][lane], f"lane {lane}"


def test_the_order_is_a_wavefront():
    with scene("lstm") as (patch, module):
        lanes = Watched()
        walk(patch, module, lanes)
    chunks = -(-T // CHUNK)
    for way in ("forward", "backward"):
        seen = [(layer, chunk) for w, layer, chunk, _ in lanes.tasks if w == way]
        if way == "backward":  # chunks are counted in the order they come
            seen = [(2 - layer, chunk) for layer, chunk in seen]
        assert [sum(task) for task in seen] == sorted(sum(task) for task in seen), "by diagonals"
        assert set(seen) == {(layer, k) for layer in range(3) for k in range(chunks)}
        ends = {
            (layer, k): clock
            for (w, _, _, clock), (layer, k) in zip([t for t in lanes.tasks if t[0] == way], seen, strict=True)
        }
        for (layer, k), clock in ends.items():
            other = ends.get((layer + 1, k - 1))
            if other is not None:
                assert not knows(clock, other), f"{way}: nothing lets {(layer, k)} and its neighbour run together"
                assert not knows(other, clock)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_no_more_recurrences_at_once_than_there_is_room_for(monkeypatch, room):
    """Of any room + 1 recurrences one knows, at its end, that another has ended."""
    monkeypatch.setattr(Engine, "part", 1 / room)
    with scene("lstm", layers=4) as (patch, module):
        lanes = Watched()
        walk(patch, module, lanes, "dense")
    for way in ("forward", "backward"):
        clocks = [clock for w, *_, clock in lanes.tasks if w == way]
        together = [
            group
            for group in itertools.combinations(clocks, room)
            if not any(knows(a, b) for a, b in itertools.permutations(group, 2))
        ]
        assert together, f"{way}: never are there so many"
        for group in together:
            for clock in clocks:
                others = (knows(clock, a) or knows(a, clock) for a in group)
                assert any(others), f"{way}: {room + 1} at a time"


def knows(clock: dict[int, int], other: dict[int, int]) -> bool:
    """Does the end of one task come after that of the other?"""
    return all(clock.get(lane, 0) >= n for lane, n in other.items())

"""The same bits from run to run, for any number of threads, from several Python threads at once, and after fork."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from engine_support import CPU, ENGINE, Case, assert_same_bits, make_call

import fastrnn
from fastrnn.backends.base import GATES
from fastrnn.cells import CELLS

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(ENGINE is None, reason="the engine is not built"),
]
BOTH = (False, True)
# Large enough that csrc/cpu/plan.h gives them to several threads, and cut in each of its ways.
SPLITS = {
    "units": Case(T=4, B=1, I=64, H=256),
    "units, ragged last vector": Case(T=3, B=2, I=30, H=331),
    "units, a single step": Case(T=1, B=1, I=256, H=512, single=True),
    "batch": Case(T=4, B=64, I=30, H=64),
    "batch, uneven": Case(T=5, B=29, I=30, H=70),
    "batch, ragged": Case(T=9, B=31, I=30, H=70, lengths=True, resets=True),
    "streams": Case(T=12, B=4, I=64, H=64, reverse=BOTH),
    "streams and units": Case(T=3, B=1, I=64, H=256, reverse=BOTH),
    "streams and batch": Case(T=4, B=40, I=30, H=70, reverse=BOTH, lengths=True),
    "batch and units": Case(T=4, B=13, I=30, H=130),
    "long, in chunks": Case(T=300, B=1, I=16, H=130),
    "batch, chunks": Case(T=30, B=41, I=30, H=40, reverse=BOTH, lengths=True, resets=True),
    "batch, blocks": Case(T=2, B=600, I=30, H=19),
    "large weights, units": Case(T=5, B=3, I=541, H=523, reverse=BOTH, lengths=True, resets=True),
    "large weights, batch": Case(T=3, B=14, I=541, H=523),
    "projection, units": Case(T=4, B=2, I=64, H=256, P=100),
    "projection, batch": Case(T=4, B=30, I=30, H=70, P=33, reverse=BOTH),
}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def engine_alone(call, threads, last=True):
    """Forward and backward of the engine on `threads` threads, without torch's own, which hang after fork."""
    with torch.no_grad():
        torch.set_num_threads(threads)
        result = CPU.forward(call, GATES)
        torch.set_num_threads(1)
        saved = {f"saved {k}": a.clone() for k, a in enumerate(result.saved) if a is not None}
        g = torch.Generator().manual_seed(1)
        dy, *dfinals = (
            torch.randn(a.shape, generator=g, dtype=torch.float64).to(a.dtype) for a in (result.y, *result.finals)
        )
        needed = (True,) * (1 + len(call.states)) + tuple(a is not None for w in call.weights for a in w)
        torch.set_num_threads(threads)
        grads = CPU.backward(call, result.saved, result.y, dy, tuple(dfinals), needed, last)
        torch.set_num_threads(1)
    named = {"y": result.y, **{f"final {k}": a for k, a in enumerate(result.finals)}, **saved}
    if not last:
        for k, a in saved.items():
            assert torch.equal(result.saved[int(k.split()[1])], a), f"{k} was overwritten"
    named |= {"dx": grads.dx, **{f"dstate {k}": a for k, a in enumerate(grads.dstates)}}
    if grads.dweights is None:
        assert call.x.dtype in (torch.bfloat16, torch.float16)
        named["dgates"] = grads.dgates
    for s, w in enumerate(grads.dweights or ()):
        named |= {f"d{field} of stream {s}": a for field, a in w._asdict().items() if a is not None}
    return named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cell", "split"), [(c, n) for c, n in itertools.product(CELLS, SPLITS) if c == "lstm" or not SPLITS[n].P]
)
def test_same_bits_for_any_number_of_threads(cell, split, dtype):
    call = make_call(SPLITS[split]._replace(cell=cell), dtype, grad=False)
    alone = engine_alone(call, 1)
    for threads, last in itertools.product((1, 2, 3), (True, False)):
        assert_same_bits(f"{threads} threads, {split}, last={last}", engine_alone(call, threads, last), alone)


def train(module, x):
    """Output and gradients of one step of training, and the output of inference."""
    x = x.clone().requires_grad_()
    y = module(x)[0]
    grads = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    with torch.inference_mode():
        again = module(x)[0].clone()
    return {"y": y.detach(), "inference": again, **{f"gradient {k}": g for k, g in enumerate(grads)}}


@pytest.mark.parametrize("threads", [1, 2])
def test_several_python_threads_at_once(threads):
    torch.set_num_threads(threads)
    kinds = [(fastrnn.LSTM, 19, 5), (fastrnn.GRU, 64, 40), (fastrnn.RNN, 256, 1), (fastrnn.LSTM, 256, 1)]
    jobs = [(make(16, hidden, 2, backend="cpu"), torch.randn(6, batch, 16)) for make, hidden, batch in kinds]
    alone = [train(*job) for job in jobs]
    found: list[list[dict[str, torch.Tensor]]] = [[] for _ in jobs]
    start = threading.Barrier(len(jobs))

    def work(k):
        start.wait()
        for _ in range(8):
            found[k].append(train(*jobs[k]))

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(len(jobs))]
    for w in workers:
        w.start()
    for w in workers:
        w.join(timeout=120)
        assert not w.is_alive(), "a thread hangs"
    for k, results in enumerate(found):
        assert len(results) == 8
        for result in results:
            assert_same_bits(f"job {k}", result, alone[k])


def script(text, *arguments, limit=120):
    """Runs a program of its own with a time limit; returns what it printed."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=limit, cwd=tests,
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FORK = """
import os, sys, torch
from engine_support import make_call, Case
from test_engine_threads import SPLITS, engine_alone

torch.set_num_threads(1)
calls = [make_call(SPLITS[n], torch.float32, grad=False) for n in ("units", "batch", "streams")]
want = [engine_alone(c, 2) for c in calls]

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return len(calls)
    def __getitem__(self, k):
        return k, engine_alone(calls[k], 2)["y"]

def child():
    return all(torch.equal(got[n], w[n]) for c, w in zip(calls, want) for got in [engine_alone(c, 2)] for n in w)

pid = os.fork()
if pid == 0:
    os._exit(0 if child() else 3)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert child(), "the parent after fork"
loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
for k, y in loader:
    assert torch.equal(y, want[k]["y"]), k
print("forked")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork_and_in_a_data_loader():
    assert "forked" in script(FORK)


COUNT = """
import os, sys, torch
from engine_support import make_call
from test_engine_threads import SPLITS, engine_alone

torch.set_num_threads(1)  # torch is to start none of its own
calls = {n: make_call(case, torch.float32, grad=False) for n, case in SPLITS.items()}
engine_alone(calls[sys.argv[1]], 1)
before = len(os.listdir("/proc/self/task"))
engine_alone(calls[sys.argv[1]], 3)
print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
@pytest.mark.parametrize("split", ["units", "batch", "streams and units"])
def test_threads_are_used(split):
    before, after = map(int, script(COUNT, split).split())
    assert after > before

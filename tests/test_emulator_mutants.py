"""The tests of the kernels tested: each change below breaks a kernel, and the emulator has to notice.

A changed copy of csrc is compiled for one cell and number type and linked with the emulator's other objects.
"""

from __future__ import annotations

from pathlib import Path

import emulator_build
import pytest
from emulator_mutant import first_wrong
from emulator_support import needs_emulator

from fastrnn.bench import apart

pytestmark = [needs_emulator, pytest.mark.slow]
FORWARD, FORWARD_TILE, FORWARD_STATE = "forward.cuh", "forward_tile.cuh", "forward_state.cuh"
BACKWARD, BACKWARD_TILE, BACKWARD_STATE = "backward.cuh", "backward_tile.cuh", "backward_state.cuh"
GROUP, TILES = "group.cuh", "tiles.cuh"
CLUSTER_BARRIER = "  }\n  ptx::cluster_arrive();\n  ptx::cluster_wait();\n"
# what is wrong: (file, text, text in its place)
MUTANTS = {
    "fragment of A": (FORWARD_TILE, "8 * (i & 1),", "8 * (i >> 1),"),
    "fragment of C": (FORWARD_TILE, "lane % 4 * 2 + ((e", "lane % 4 + 4 * ((e"),
    "fragment of B": (FORWARD, "f.lane / 8 * 16", "(f.lane / 8 ^ 1) * 16"),
    "no wait for h": (FORWARD, "ptx::mbarrier_wait(f.barrier + 8 * now, (n - 1) >> 1 & 1);", ""),
    "no barrier of the block": (FORWARD, "      } else {\n        ptx::sync_block();", "      } else {"),
    "wrong parity": (FORWARD, "(n - 1) >> 1 & 1", "n >> 1 & 1"),
    "bytes expected": (FORWARD, "F::kRows * sizeof(T);  // of h", "F::kRows * sizeof(T) + 16;"),
    "no cluster barrier at the start": (TILES, CLUSTER_BARRIER, "  }\n"),
    "no wait for x": (FORWARD, "ptx::copy_wait<kForwardStages - 2>();", ""),
    "no barrier before the sums": (FORWARD, "    f.sync_group();\n    f.fetch", "    f.fetch"),
    "no barrier before h is sent": (FORWARD, "    f.sync_group();\n    if (n + 1", "    if (n + 1"),
    "one buffer of h": (FORWARD, "const int now = F::kGrid ? 0 : n & 1;", "const int now = 0;"),
    "too few stages of x": (
        FORWARD,
        "f.fetch(rows, n + kForwardStages - 1);",
        "f.fetch(rows, n + kForwardStages - 2);",
    ),
    "reset a step late": (FORWARD_STATE, "rows.cut(rows.time(n_step + 1), b)", "rows.cut(rows.time(n_step), b)"),
    "state runs on beyond the end": (FORWARD_STATE, "s[k][n][e] = live ? plain", "s[k][n][e] = true ? plain"),
    "output not zero beyond the end": (
        FORWARD_STATE,
        "from_float<T>(live ? s[0][n][e] : 0.0f)",
        "from_float<T>(s[0][n][e])",
    ),
    "backward: no wait for shares": (BACKWARD, "ptx::mbarrier_wait(f.barrier + 8 * now, (n - 1) >> 1 & 1);", ""),
    "backward: no cluster barrier at the start": (TILES, CLUSTER_BARRIER, "  }\n"),
    "backward: one buffer of gates": (
        BACKWARD_STATE,
        "(n & 1) * F::kRows * f.at.gate_row",
        "0 * F::kRows * f.at.gate_row",
    ),
    "backward: shares of the other buffer": (BACKWARD_STATE, "F::kGrid ? 0 : n & 1, from", "~n & 1, from"),
    "backward: no barrier after the step": (BACKWARD, "    ptx::sync_block();\n    f.fetch", "    f.fetch"),
    "backward: waits for too little": (BACKWARD, "copy_wait<kBackwardStages - 3>", "copy_wait<kBackwardStages - 2>"),
    "backward: gradient across a reset": (BACKWARD_STATE, "if (n > 0 && !cut[i])", "if (n > 0)"),
    "backward: initial state of a reverse row": (BACKWARD_TILE, "t + 1 < lengths[b] ? t + 1", "t + 1 < p.n.T ? t + 1"),
    "backward: gradient stops at the end": (
        BACKWARD_STATE,
        "live ? plain(back[0]) : dh",
        "live ? plain(back[0]) : 0.0f",
    ),
    "backward: share of a peer lost": (
        BACKWARD_STATE,
        "from < f.at.shares;",
        "from < f.at.shares - (f.at.shares > 1);",
    ),
    "K2: no wait": (FORWARD, "        meeting.wait();\n", "        ++meeting.epoch;\n        ptx::sync_block();\n"),
    "K2: waits for the epoch before": (GROUP, "flag_wait(flags + i, epoch)", "flag_wait(flags + i, epoch - 1)"),
    "K2: waits for all but one": (GROUP, "i < blocks;", "i < blocks - 1;"),
    "K2: no fence before the flag": (GROUP, "      ptx::fence();\n", ""),
    "K2: no barrier before the flag": (GROUP, "arrive() const {\n    ptx::sync_block();", "arrive() const {"),
    "K2: one buffer": (GROUP, "((epoch + next) & 1)", "0"),
    "K2: the units of another block": (
        FORWARD_TILE,
        "sizeof(T))) + unit0;",
        "sizeof(T))) + (unit0 + kUnits) % width();",
    ),
    "K2: no barrier after h has come": (FORWARD_TILE, "= v[k];\n      }\n    ptx::sync_block();", "= v[k];\n      }"),
    "K2: no barrier between tiles": (TILES, "      ptx::sync_block();\n      if (i == first", "      if (i == first"),
    "K2: weights of the other direction": (TILES, "if (i == first || i % tiles == 0)", "if (i == first)"),
    "K2 backward: no wait": (
        BACKWARD,
        "        meeting.wait();\n",
        "        ++meeting.epoch;\n        ptx::sync_block();\n",
    ),
    "K2 backward: no fence before the flag": (GROUP, "      ptx::fence();\n", ""),
    "K2 backward: one buffer": (GROUP, "((epoch + next) & 1)", "0"),
    "K2 backward: to the wrong block": (
        BACKWARD_TILE,
        "(size_t(rank) * width()",
        "(size_t(rank ^ 1) % p.n.blocks * width()",
    ),
    "K2 backward: rounds lost": (
        BACKWARD_TILE,
        "if (row_tile(round, 0) * 16 < width())",
        "if (row_tile(round, 0) < 0)",
    ),
    "K2 backward: no barrier after the shares": (
        BACKWARD_TILE,
        "= sum[k];\n    }\n    ptx::sync_block();",
        "= sum[k];\n    }",
    ),
}


def changed(folder: Path, change: tuple[str, str, str] | None, direction: str = "forward") -> Path:
    """The emulator with one kernel of the changed text; its folder."""
    copy = emulator_build.sources(folder)
    if change is not None:
        file, old, new = change
        emulator_build.replace(copy / "cuda" / file, old, new)
    emulator_build.build(folder, [f"{direction}_Lstm_Bf16.cpp"])
    return folder


@pytest.mark.parametrize("kernel", [1, 2])
def test_the_right_kernels_pass(tmp_path, kernel):
    assert apart.call(first_wrong, changed(tmp_path, None), kernel) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(tmp_path, name):
    direction = "backward" if "backward: " in name else "forward"
    assert apart.call(first_wrong, changed(tmp_path, MUTANTS[name], direction), 2 if name.startswith("K2") else 1)

"""Attention of one new token on a cache in each format, relative to float32.

    python benchmarks/caches.py [--keys 512 4096 16384]

Eight heads of keys with 64 channels, four heads of queries for each, on one thread; formats take turns, and medians are
compared.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from qc.backends.tvm.isa import best_for_host
from qc.backends.tvm.kernels.attention import Heads, attend_few
from qc.backends.tvm.kernels.caches import CELLS, Cells
from qc.backends.tvm.toolchain import compile_kernels

KEY_HEADS, SHARE, WIDTH = 8, 4, 64


class Attention:
    """A compiled kernel on random keys and values."""

    def __init__(self, held: Cells, keys: int, work: Path) -> None:
        isa, rng = best_for_host(), np.random.default_rng(0)
        heads = Heads(WIDTH, WIDTH, SHARE, True, 0, False, WIDTH**-0.5, cells=held)
        (content,) = compile_kernels({"kernel": (attend_few, (heads,))}, isa, f"{isa.arch}-linux-gnu").values()
        (work / f"{held.name}.o").write_bytes(content)
        library = work / f"{held.name}-{keys}.so"
        subprocess.run(["cc", "-shared", "-o", library, work / f"{held.name}.o"], check=True)
        self._function = ctypes.CDLL(str(library))["kernel"]
        rows = [held.encode(rng.standard_normal((KEY_HEADS, keys, WIDTH), np.float32)) for _ in range(2)]
        per_key, more = heads.scratch(isa, many=False, keys=keys)
        query = rng.standard_normal((KEY_HEADS * SHARE, WIDTH), np.float32)
        scores = np.empty(KEY_HEADS * keys * per_key + more, np.float32)
        self._arrays = [query, *rows, np.empty_like(query), scores, np.array([keys - 1], np.int32)]
        unit = 1 if held.narrow else 4
        steps = [0, WIDTH, WIDTH, *[0, *(s // unit for s in rows[0].strides[:2])] * 2, 0, WIDTH, WIDTH]
        self._integers = [KEY_HEADS, 1, keys, keys, *steps, 0, KEY_HEADS]

    def seconds(self) -> float:
        """Runs once."""
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in self._arrays]
        numbers = [ctypes.c_int32(i) for i in self._integers]
        started = time.perf_counter()
        self._function(*pointers, *numbers)
        return time.perf_counter() - started


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[512, 4096, 16384], help="multiples of 32")
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    print(f"{'keys':>6} {'cache':8} {'ms':>8} {'speed':>6}")
    for keys in given.keys:
        with tempfile.TemporaryDirectory() as work:
            made = {held.name: Attention(held, keys, Path(work)) for held in CELLS.values()}
            times = {name: [] for name in made}
            for _ in range(given.rounds):
                for name, attention in made.items():
                    times[name].append(attention.seconds())
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, median in medians.items():
            print(f"{keys:6} {name:8} {1e3 * median:8.3f} {medians['float32'] / median:6.2f}")


if __name__ == "__main__":
    main()

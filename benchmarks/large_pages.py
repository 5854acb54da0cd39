"""How much faster a C library reads weights where Linux maps them in large pages.

    python benchmarks/large_pages.py [--format int4:g32] [--size 16384] [--rounds 15] [--work DIR]

One product of one row with a weight that no cache holds, on one thread, from the file as it is emitted and from a copy
that is written in pages of 4 KiB, in turns; wall time. Prints how much of each is mapped in large pages, which is up to
the file system, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from weight_costs import emit_product

from qc.backends.tvm.backend import TvmCpu

WEIGHTS = "model.weights"


def copy_in_pages(source: Path, directory: Path) -> None:
    """Copies an artifact; its weights in pages of 4 KiB."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns(WEIGHTS))
    with (source / WEIGHTS).open("rb") as read, (directory / WEIGHTS).open("wb", buffering=0) as written:
        while page := read.read(4096):
            written.write(page)


def share_in_large_pages(file: Path) -> float:
    """What part of a file is mapped in large pages."""
    found = re.search(rf"{re.escape(str(file))}\nSize: +(\d+).*?FilePmdMapped: +(\d+)", _maps(), re.DOTALL)
    return int(found[2]) / int(found[1]) if found else 0.0


def _maps() -> str:
    return Path("/proc/self/smaps").read_text("utf-8")


def main() -> None:
    """Prints one line per file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", default="int4:g32")
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", help="directory on the file system to measure")
    given = parser.parse_args()
    x = np.random.default_rng(1).standard_normal((1, given.size)).astype(np.float32)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        places = {"as emitted": Path(work) / "emitted", "in 4 KiB": Path(work) / "pages"}
        places["as emitted"].mkdir()
        emit_product(given.format, given.size, places["as emitted"])
        copy_in_pages(places["as emitted"], places["in 4 KiB"])
        runners = {name: TvmCpu().open(place, threads=1) for name, place in places.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(given.rounds + 1):
            for name, runner in runners.items():
                started = time.perf_counter()
                runner.run({"x": x})
                times[name].append(time.perf_counter() - started)
        size = (places["as emitted"] / WEIGHTS).stat().st_size
        for name, place in places.items():
            speed = size / statistics.median(times[name][1:]) * 1e-9
            print(f"{name:12}{share_in_large_pages(place / WEIGHTS):>6.0%} in large pages {speed:>6.1f} GB/s")
        pairs = zip(times["in 4 KiB"][1:], times["as emitted"][1:], strict=True)
        print(f"ratio       {statistics.median(a / b for a, b in pairs):>6.2f}")


if __name__ == "__main__":
    main()

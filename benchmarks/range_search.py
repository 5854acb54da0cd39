"""Rates and errors of range search for affine weights, against absmax and harder searches.

    python benchmarks/range_search.py [--rows 512] [--tails normal|t5|t3] [--effort-format int4:g32:f16]

Prints, per format, the relative squared error of absmax and of the default search, and the rate of the search in
million weights per second of one core; then, for one format, the error against the rate of other efforts. This is how
the defaults of `qc.passes.quantize.assign.Search` were chosen: within a thousandth of the least error found.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from qc.ir.quant import Format, QuantizedTensor
from qc.passes.quantize.assign import Search, assign

FORMATS = [f"{u}int4{g}:f16" for u in ("", "u") for g in (":g32", ":g64", ":g128", "")]
FORMATS += [f"{u}int2{g}:f16" for u in ("", "u") for g in (":g32", ":g128")]
FORMATS += ["int8:g128:f16", "uint8:g128:f16", "int8", "uint8"]
EFFORTS = {
    "coarse 2": Search(2, (), 0),
    "coarse 4": Search(4, (), 1),
    "coarse 6": Search(6, (), 1),
    "coarse 8": Search(8, (), 1),
    "default": Search(),
    "coarse 12": Search(12, (), 1),
    "coarse 24": Search(24, (), 1),
    "coarse 60, fine 6, polish 4": Search(60, (-0.02, -0.01, -0.005, 0.005, 0.01, 0.02), 4),
}


def absmax(weight: np.ndarray, format: Format) -> QuantizedTensor:
    """Scales from the range of each group, for a number of columns that whole groups fill."""
    width = weight.shape[1] if format.group is None else format.group
    grouped = weight.reshape(len(weight), -1, width)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    top = (1 << format.values.bits) - 1
    scale = np.maximum(-low, high) / (top // 2) if format.values.symmetric else (high - low) / top
    stored = scale.astype(format.scale.dtype.numpy())
    scale = stored.astype(np.float32)[..., None]
    zero = 0 if format.values.symmetric else np.clip(np.rint(-low[..., None] / scale), 0, top)
    codes = np.clip(np.rint(grouped / scale) + zero, format.values.low, format.values.high).astype(np.int16)
    params = {"scale": stored} | ({} if format.values.symmetric else {"zero_point": zero[..., 0].astype(np.uint8)})
    return QuantizedTensor(format, codes.reshape(weight.shape), params)


def error(weight: np.ndarray, tensor: QuantizedTensor) -> float:
    """Relative squared error."""
    return float(np.sum((weight - tensor.decode()) ** 2) / np.sum(weight**2))


def timed(weight: np.ndarray, format: Format, effort: Search) -> tuple[QuantizedTensor, float]:
    """The quantized weight and the best rate of three runs, in million weights per second of processor time."""
    best, tensor = float("inf"), None
    for _ in range(3):
        start = time.process_time()
        tensor = assign(weight, format, effort=effort)
        best = min(best, time.process_time() - start)
    assert tensor is not None
    return tensor, weight.size / best / 1e6


def main() -> None:
    """Parses the command line and prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tails", choices=("normal", "t5", "t3"), default="normal")
    parser.add_argument("--effort-format", default="int4:g32:f16")
    options = parser.parse_args()
    rng, shape = np.random.default_rng(0), (options.rows, 4096)
    weight = rng.standard_normal(shape) if options.tails == "normal" else rng.standard_t(int(options.tails[1:]), shape)
    weight = weight.astype(np.float32)
    print(f"{'format':<16}{'absmax':>12}{'search':>12}{'ratio':>8}{'Mweight/s':>11}")
    for text in FORMATS:
        format = Format.parse(text)
        tensor, rate = timed(weight, format, Search())
        plain, found = error(weight, absmax(weight, format)), error(weight, tensor)
        print(f"{text:<16}{plain:>12.6g}{found:>12.6g}{found / plain:>8.3f}{rate:>11.1f}")
    format = Format.parse(options.effort_format)
    print(f"\n{'effort, ' + str(format):<32}{'error':>12}{'Mweight/s':>11}")
    for name, effort in EFFORTS.items():
        tensor, rate = timed(weight, format, effort)
        print(f"{name:<32}{error(weight, tensor):>12.6g}{rate:>11.1f}")


if __name__ == "__main__":
    main()

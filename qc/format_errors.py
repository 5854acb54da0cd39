"""``qc inspect --formats``: what every weight would lose in which format, at how many bits."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.quant import Format
from qc.passes.quantize._sites import weight_uses
from qc.passes.quantize.assign import assign

__all__ = ["COMPARED", "formats", "plot"]

COMPARED = (
    "mid1", "bin2:g64", "uint2:g32:f16", "mid2:g64:f16", "lut2", "bitmod3:g128:f16", "uint3:g64:f16",
    "uint3:g128:f16", "lut3", "uint4:g32:f16", "uint4:g64:f16", "uint4:g128:f16", "int4:g32:f16", "nf4:g64:q8x256",
    "bitmod4:g128:f16", "mxfp4", "nvfp4", "lut4", "uint5:g64:f16", "mxfp6", "mxint8", "int8",
)  # fmt: skip
"""Formats that are compared: from 1 to 8 bits, each kind of values but codebooks, which few rows say little about."""

_ELEMENTS = 1 << 15
"""Elements of a weight that the error is measured on: enough rows for two digits."""


def formats(model: ir.Model) -> dict[str, object]:
    """Measures every quantizable weight in every format of `COMPARED`, on evenly spaced rows, without calibration.

    Returns:
        ``{"compared": [{"format", "bits_per_weight", "error"}], "weights": [{"name", "shape", "elements", "errors":
        [...]}]}``: ``error`` is ``sum (w - decoded)^2 / sum w^2``; the first list has the mean over all weights, each
        element counted alike. A format that cannot express a weight is left out there.
    """
    rows: list[dict] = []
    seen = set()
    for use in weight_uses(model):
        if use.reason or use.weight is None or use.weight.format is not None or use.weight.data in seen:
            continue
        seen.add(use.weight.data)
        shape = use.weight.shape
        numbers = use.weight.raw()
        count = max(1, min(shape[0], _ELEMENTS // shape[1]))
        sample = np.array(numbers[np.unique(np.linspace(0, shape[0] - 1, count).astype(int))], np.float32)
        del numbers
        use.weight.release()
        errors = [e for spelling in COMPARED if (e := _error(sample, spelling, shape)) is not None]
        rows.append({"name": use.name, "shape": list(shape), "elements": math.prod(shape), "errors": errors})
    return {"compared": _means(rows), "weights": rows}


def _error(sample: np.ndarray, spelling: str, shape: tuple[int, ...]) -> dict | None:
    format = Format.parse(spelling)
    energy = float(np.vdot(sample, sample))
    try:
        bits = format.stored_bits(shape) / math.prod(shape)
        noise = sample - assign(sample, format).decode()
    except InputError:
        return None
    return {
        "format": spelling,
        "bits_per_weight": bits,
        "error": float(np.vdot(noise, noise)) / energy if energy else 0.0,
    }


def _means(rows: Sequence[Mapping]) -> list[dict]:
    found = []
    for spelling in COMPARED:
        entries = [(r["elements"], e) for r in rows for e in r["errors"] if e["format"] == spelling]
        total = sum(n for n, _ in entries)
        if total:
            means = {key: sum(n * e[key] for n, e in entries) / total for key in ("bits_per_weight", "error")}
            found.append({"format": spelling, **means})
    return sorted(found, key=lambda e: e["bits_per_weight"])


def plot(data: Mapping) -> str:
    """An SVG of the mean error against the bits per weight; what no other format beats in both is joined by a line."""
    points = [(e["bits_per_weight"], max(e["error"], 1e-9), e["format"]) for e in data["compared"]]
    if not points:
        raise InputError("Expected a model with float weights to compare formats on, found none.")
    width, height, left, top = 760, 480, 60, 20
    right = math.ceil(max(p[0] for p in points))
    low, high = (f(math.log10(p(e for _, e, _ in points))) for f, p in ((math.floor, min), (math.ceil, max)))

    def place(bits: float, error: float) -> tuple[float, float]:
        x = left + (width - left - 20) * bits / right
        return x, top + (height - top - 50) * (high - math.log10(error)) / max(high - low, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"',
        ' font-size="11"><rect width="100%" height="100%" fill="white"/>',
    ]
    for bits in range(right + 1):
        x, y = place(bits, 10**low)
        parts.append(
            f'<path d="M{x:.1f} {top}V{y:.1f}" stroke="#ddd"/><text x="{x:.1f}" y="{y + 16:.1f}">{bits}</text>'
        )
    for power in range(low, high + 1):
        x, y = place(0, 10**power)
        parts.append(
            f'<path d="M{x:.1f} {y:.1f}H{width - 20}" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">1e{power}</text>'
        )
    best, line = math.inf, []
    for bits, error, _ in sorted(points):
        if error < best:
            best = error
            line.append("{:.1f},{:.1f}".format(*place(bits, error)))
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="#06c"/>')
    for bits, error, name in points:
        x, y = place(bits, error)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x + 5:.1f}" y="{y - 4:.1f}">{html.escape(name)}</text>'
        )
    parts.append(f'<text x="{width / 2:.0f}" y="{height - 12}">stored bits per weight</text></svg>\n')
    return "".join(parts)

"""What a product with a quantized weight costs when one token is decoded, per weight, by target.

Data, measured by benchmarks/weight_costs.py: processor time per weight over that of ``uint4`` in groups of 32. Formats
that are not listed have no fused kernel on that target.
"""

from __future__ import annotations

from qc.ir.quant import Affine, FloatScale, Format

__all__ = ["TARGETS", "relative_time"]

TARGETS: dict[str, dict[tuple[int, int], float]] = {
    "ort-cpu": {
        (2, 32): 1.3,
        (2, 64): 0.73,
        (2, 128): 0.48,
        (4, 16): 1.7,
        (4, 32): 1.0,
        (4, 64): 0.94,
        (4, 128): 0.89,
        (4, 256): 0.8,
        (8, 16): 1.95,
        (8, 32): 1.65,
        (8, 64): 1.6,
        (8, 128): 1.45,
        (8, 256): 1.4,
    },
    "tvm-cpu": {
        (2, 16): 0.93,
        (2, 32): 0.73,
        (2, 64): 0.67,
        (2, 128): 0.64,
        (2, 256): 0.64,
        (3, 32): 0.87,
        (3, 64): 0.85,
        (3, 128): 0.8,
        (3, 256): 0.74,
        (4, 16): 1.2,
        (4, 32): 1.0,
        (4, 64): 0.84,
        (4, 128): 0.76,
        (4, 256): 0.85,
        (8, 16): 1.8,
        (8, 32): 1.75,
        (8, 64): 1.51,
        (8, 128): 1.54,
        (8, 256): 1.57,
    },
}
"""By bits and group, for integer zero points or none. ONNX Runtime 1.31.1 and TVM 0.27.0, AVX-512, one thread,
2048 x 2048; the latter beside other work."""


def relative_time(format: Format, columns: int, target: str) -> float | None:
    """Time per weight in units of ``uint4`` in groups of 32, or None where there is no fused kernel."""
    values = format.values
    if not isinstance(values, Affine) or not isinstance(format.scale, FloatScale) or format.axis != "in":
        return None
    return TARGETS[target].get((values.bits, format.width(columns)))

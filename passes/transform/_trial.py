"""Tries transforms on samples: how far products with rounded weights and activations are from what they shall yield."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qc.ir.channels import Use
from qc.ir.errors import InputError
from qc.ir.quant import Format, read_weight
from qc.passes.quantize.assign import assign
from qc.passes.quantize.weights import fitted
from qc.passes.statistics import Statistic
from qc.passes.transform._inputs import Inputs

__all__ = ["GRANULARITIES", "STATISTICS", "Product", "Quantizers", "Trial", "stored"]

GRANULARITIES = ("tensor", "token")

STATISTICS = (Statistic.SAMPLES, Statistic.MIN, Statistic.MAX)
"""What a trial needs of the input of each product."""

_ROWS = 128
"""Rows of each weight that are tried, evenly spaced: all rows share a transform, and more rows choose no other."""

_SAMPLES = 512
"""Rows of the input that are tried, evenly spaced."""


@dataclasses.dataclass(frozen=True)
class Quantizers:
    """What rounds products after the transform.

    Attributes:
        weights: Format of weights.
        bits: Bits of an activation; codes are asymmetric.
        granularity: ``tensor``: one range, that of the calibration data; ``token``: a range per row.
        threads: Number of threads.
    """

    weights: Format
    bits: int
    granularity: str
    threads: int = 1

    @classmethod
    def parse(cls, name: str, weights: str, bits: int, granularity: str, threads: int = 1) -> Quantizers:
        """Reads the options of a pass.

        Raises:
            InputError: If one of them is unknown.
        """
        if not 2 <= bits <= 16:
            raise InputError(f"Expected 2 to 16 bits of activations for {name}, found {bits}.")
        if granularity not in GRANULARITIES:
            known = " or ".join(GRANULARITIES)
            raise InputError(f"Expected the granularity of {name} to be {known}, found {granularity!r}.")
        return cls(Format.parse(weights), bits, granularity, threads)

    def activation(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Rounds ``x [S, K]``, whose channels lie between `low` and `high` ``[K]`` on all calibration data."""
        if self.granularity == "token":
            low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
        else:
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        levels = (1 << self.bits) - 1
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        step = np.where(high > low, (high - low) / levels, 1.0).astype(np.float32)
        zero = np.rint(-low / step).astype(np.float32)
        return (np.clip(np.rint(x / step) + zero, 0, levels) - zero) * step

    def weight(self, rows: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """Rounds ``rows [N, K]``, whose columns are multiplied with inputs of second moment `moment` ``[K]``."""
        return assign(rows, fitted(self.weights, rows.shape[1]), moment, threads=self.threads).decode()


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A product as it is tried.

    Attributes:
        x: Rows of its input, ``[S, K]``.
        low: The smallest value of each channel, ``[K]``.
        high: The largest.
        rows: Rows of its weight, ``[N, K]``.
    """

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray


Change = Callable[[Use, Product], Product]


class Trial:
    """The products on one channel group, without any change, and the error with changes.

    The error of each product counts in relation to the size of its output.
    """

    def __init__(
        self, products: Sequence[Use], columns: Mapping[Statistic, Sequence[np.ndarray]], quantizers: Quantizers
    ) -> None:
        """Reads a sample of each weight.

        Args:
            products: Weights of linear layers.
            columns: `STATISTICS` of the input of each.
            quantizers: What rounds them.
        """
        self._quantizers = quantizers
        self.products: dict[Use, Product] = {}
        self._outputs: dict[Use, np.ndarray] = {}
        for use, samples, low, high in zip(products, *(columns[s] for s in STATISTICS), strict=True):
            x = samples[:: -(-len(samples) // _SAMPLES)]
            product = Product(x, low, high, stored(use, _ROWS))
            self.products[use] = product
            self._outputs[use] = x @ product.rows.T

    def error(self, change: Change) -> float:
        """The sum over products of ``|Q(x') Q(W')^T - x W^T|^2 / |x W^T|^2``, with what `change` makes of a product."""
        total = 0.0
        for use, product in self.products.items():
            changed, expected = change(use, product), self._outputs[use]
            weights = self._quantizers.weight(changed.rows, np.square(changed.x).mean(axis=0, dtype=np.float64))
            found = self._quantizers.activation(changed.x, changed.low, changed.high) @ weights.T
            size = float(np.vdot(expected, expected))
            total += float(np.square(found - expected).sum(dtype=np.float64)) / (size if size > 0 else 1.0)
        return total

    def scaled(self, inputs: Inputs, factors: np.ndarray) -> float:
        """The error with channels divided by factors, ``[width of the group]``."""

        def change(use: Use, product: Product) -> Product:
            s = inputs.spread(factors, use).astype(np.float32)
            return Product(product.x / s, product.low / s, product.high / s, product.rows * s)

        return self.error(change)


def stored(use: Use, count: int) -> np.ndarray:
    """About `count` evenly spaced rows of a weight, float32 ``[N, K]``, copied."""
    weight = read_weight(use.value)
    assert weight is not None
    numbers = weight.raw()
    rows = np.array(numbers[:: -(-len(numbers) // count)], np.float32)
    del numbers  # a view of the file
    weight.release()
    return rows

"""Tries transforms on samples: how far products with rounded weights and activations are from what they shall yield."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
"""What choices by trial need of the input of each product."""

_ROWS = 128
"""Rows of each weight that are tried, evenly spaced: all rows share a transform, and more rows choose no other."""


_TINY = 1e-30

_REACH = (1.6, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Static ranges that are tried, relative to what half of the samples shows: `quantize-activations` sees more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A product as it is tried.

    Attributes:
        x: Rows of its input, ``[S, K]``.
        low: Where a static range of each channel begins, ``[K]``.
        high: Where it ends.
        rows: Rows of its weight, ``[N, K]``.
        offsets: What splits the codes of copies, in steps of a static grid, ``[K]``.
    """

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray | float = 0.0


@dataclasses.dataclass(frozen=True)
class Quantizers:
    """What rounds products after the transform.

    Attributes:
        weights: Format of weights.
        bits: Bits of an activation; codes are asymmetric.
        granularity: ``tensor``: one static range; ``token``: a range per row.
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

    def activation(self, product: Product, power: np.ndarray, most: float = 1.0) -> np.ndarray:
        """Rounds the input of a product as `quantize-activations` will, ``[S, K]``.

        A static range is drawn in, or out up to `most` times, as far as it lessens ``sum_k power_k |x_k - x'_k|^2``,
        with ``power [K]`` the squared weights that read a channel, and the codes of copies are split.
        """
        x, offsets = product.x, product.offsets
        if self.granularity == "token":
            return self._rounded(x, x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True))
        low, high = product.low.min(keepdims=True), product.high.max(keepdims=True)
        shares = (share for share in _REACH if share <= most)
        tried = (self._rounded(x, low * share, high * share, offsets) for share in shares)
        return min(tried, key=lambda found: float(np.square(x - found).sum(axis=0, dtype=np.float64) @ power))

    def _rounded(
        self, x: np.ndarray, low: np.ndarray, high: np.ndarray, offsets: np.ndarray | float = 0.0
    ) -> np.ndarray:
        levels = (1 << self.bits) - 1
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        step = np.where(high > low, (high - low) / levels, 1.0).astype(np.float32)
        zero = np.rint(-low / step).astype(np.float32)
        return (np.clip(np.rint(x / step + offsets) + zero, 0, levels) - zero) * step

    def weight(self, rows: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """Rounds ``rows [N, K]``, whose columns are multiplied with inputs of second moment `moment` ``[K]``."""
        return assign(rows, fitted(self.weights, rows.shape[1]), moment, threads=self.threads).decode()


Change = Callable[[Use, Product], Product]


class Trial:
    """The products on one channel group, without any change, and the error with changes.

    Transforms are chosen on one half of the samples and judged on the other: what is fitted to the largest values that
    were seen meets larger ones later.

    Attributes:
        columns: `STATISTICS` of the half to choose on.
    """

    def __init__(
        self, products: Sequence[Use], samples: Sequence[np.ndarray], quantizers: Quantizers, *, beyond: bool = False
    ) -> None:
        """Reads a sample of each weight.

        Args:
            products: Weights of linear layers.
            samples: Rows of the input of each.
            quantizers: What rounds them.
            beyond: Whether static ranges may lie beyond what the first half shows.
        """
        self._quantizers, self._most = quantizers, max(_REACH) if beyond else 1.0
        halves = [(x[: -(-len(x) // 2)], x[len(x) // 2 :]) for x in samples]
        self.columns: dict[Statistic, list[np.ndarray]] = {
            Statistic.SAMPLES: [x for x, _ in halves],
            Statistic.MIN: [x.min(axis=0) for x, _ in halves],
            Statistic.MAX: [x.max(axis=0) for x, _ in halves],
        }
        bounds = zip(self.columns[Statistic.MIN], self.columns[Statistic.MAX], strict=True)
        self._products = {
            use: Product(x, low, high, stored(use, _ROWS))
            for use, (_, x), (low, high) in zip(products, halves, bounds, strict=True)
        }
        self._outputs = {use: p.x @ p.rows.T for use, p in self._products.items()}

    def error(self, change: Change) -> float:
        """The sum over products of the mean over rows y of ``x W^T`` of ``|y' - y|^2 / (|y|^2 + mean |y|^2)``.

        ``y'`` is a row of ``Q(x') Q(W')^T`` with what `change` makes of the product. Some rows are a hundred times as
        large as the others, such as those of the first token: without the first term of the denominator they alone
        would count, without the second they would not.
        """
        total = 0.0
        for use, product in self._products.items():
            changed, expected = change(use, product), self._outputs[use]
            weights = self._quantizers.weight(changed.rows, np.square(changed.x).mean(axis=0, dtype=np.float64))
            power = np.square(weights, dtype=np.float64).sum(axis=0)
            found = self._quantizers.activation(changed, power, self._most) @ weights.T
            errors, sizes = (np.square(y, dtype=np.float64).sum(axis=1) for y in (found - expected, expected))
            total += float((errors / np.maximum(sizes + sizes.mean(), _TINY)).mean())
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

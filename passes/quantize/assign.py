"""Chooses the codes of a weight. Knows formats and a metric, nothing of storage or graphs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.quant import Format, QuantizedTensor
from qc.passes.quantize._search import Search, search

__all__ = ["Search", "assign", "run_parallel", "sqnr_db", "stored_scale"]

_T = TypeVar("_T")

_CHUNK = 1 << 16
"""Elements that a thread works on at a time: its three float32 copies (768 KiB) stay in a core's cache."""

_LONGEST_TRANSPOSED = 256
"""Groups up to this length are laid out one per column, so that each operation runs over many groups at once; longer
ones are worth a run of their own, and are not moved."""


def assign(
    weight: np.ndarray,
    format: Format,
    metric: np.ndarray | None = None,
    *,
    name: str = "weight",
    threads: int = 1,
    effort: Search | None = None,
) -> QuantizedTensor:
    """Quantizes a weight by range search: the least squared error of each group over its scale and zero point.

    Scales are rounded to their storage type first, codes are the nearest to ``w / scale`` (ties to even) after that.
    A group of zeros gets scale 1 and codes that decode to zero; the last group of a row may be shorter. Temporary
    memory is a few MiB per thread. The result does not depend on the number of threads.

    Args:
        weight: ``[N, K]`` of any float type; converted a few rows at a time, so it may be a map of a file.
        format: What the codes shall mean.
        metric: ``[K]``, non-negative: weight of the squared error of each column, such as ``E[x_k^2]``; None for one.
        name: Name of the weight for messages.
        threads: Number of threads.
        effort: How hard to search; None for the default.

    Raises:
        InputError: If the weight is not a finite matrix, or a scale does not fit its storage type.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise InputError(f"Expected {name!r} as a matrix [N, K], found shape {list(weight.shape)}.")
    rows, columns = weight.shape
    if metric is not None:
        metric = np.asarray(metric, np.float32)
        if metric.shape != (columns,) or not np.all(np.isfinite(metric)) or np.any(metric < 0):
            raise InputError(f"Expected {columns} finite non-negative column weights for {name!r}.")
    groups = format.groups(columns)
    tensor = QuantizedTensor(
        format,
        np.empty((rows, columns), np.int8 if format.values.symmetric else np.uint8),
        {"scale": np.empty((rows, groups), format.scale.numpy())}
        | ({} if format.values.symmetric else {"zero_point": np.empty((rows, groups), np.uint8)}),
    )

    search_effort = Search() if effort is None else effort

    def work(start: int) -> None:
        _assign_rows(weight, tensor, slice(start, start + step), metric, name, search_effort)

    step = _rows_per_chunk(columns)
    run_parallel(work, range(0, rows, step), threads)
    return tensor


def sqnr_db(weight: np.ndarray, tensor: QuantizedTensor, *, threads: int = 1) -> float:
    """Signal to quantization noise ratio of a quantized weight in decibels, infinite if it is exact.

    Args:
        weight: ``[N, K]``, any float type.
        tensor: What it became.
        threads: Number of threads.
    """
    rows, columns = weight.shape
    step = _rows_per_chunk(columns)

    def work(start: int) -> tuple[float, float]:
        part = slice(start, start + step)
        w = np.asarray(weight[part], np.float32)
        noise = w - tensor.format.decode(tensor.codes[part], {k: v[part] for k, v in tensor.params.items()})
        return float(np.vdot(w, w)), float(np.vdot(noise, noise))

    signal, noise = np.sum(run_parallel(work, range(0, rows, step), threads), axis=0)
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def _rows_per_chunk(columns: int) -> int:
    return max(1, _CHUNK // columns)


def run_parallel(work: Callable[[int], _T], starts: range, threads: int) -> list[_T]:
    """What `work` returns for each of `starts`, in order."""
    if threads <= 1 or len(starts) == 1:
        return [work(start) for start in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, starts))


def _assign_rows(
    weight: np.ndarray, tensor: QuantizedTensor, part: slice, metric: np.ndarray | None, name: str, effort: Search
) -> None:
    format, codes = tensor.format, tensor.codes[part]
    columns = codes.shape[1]
    groups = format.groups(columns)
    width = columns if format.group is None else format.group
    axis = 0 if width <= _LONGEST_TRANSPOSED else 1
    w = _grouped(np.asarray(weight[part], np.float32), groups, width, axis)
    importance = None if metric is None else _importance(metric, len(codes), groups, width, axis)
    found = search(w, format.values, axis, importance, effort)
    if found is None:
        raise InputError(
            f"Expected finite numbers in weight {name!r}, found NaN, infinity or a range that overflows float32 in "
            f"rows {part.start} to {part.start + len(codes) - 1}. Repair the model, or exclude this weight."
        )
    scale = stored_scale(found.scale, format.scale, name)
    unit = scale.astype(np.float32)
    low, high = format.values.low, format.values.high
    np.rint(np.divide(w, unit, out=w), out=w)
    if not format.values.symmetric:
        w += found.zero
        tensor.params["zero_point"][part] = found.zero.astype(np.uint8).reshape(-1, groups)
    np.clip(w, low, high, out=w)
    held = w.astype(codes.dtype)
    held = (held.T if axis == 0 else held).reshape(len(codes), groups * width)
    codes[:] = held[:, :columns]
    tensor.params["scale"][part] = scale.reshape(-1, groups)


def _grouped(chunk: np.ndarray, groups: int, width: int, axis: int) -> np.ndarray:
    """Copies rows into a matrix with one group per column (axis 0) or row (axis 1), padded with zeros."""
    rows, columns = chunk.shape
    if groups * width != columns:
        chunk = np.pad(chunk, ((0, 0), (0, groups * width - columns)))
    flat = chunk.reshape(rows * groups, width)
    return np.array(flat.T if axis == 0 else flat, order="C")


def _importance(metric: np.ndarray, rows: int, groups: int, width: int, axis: int) -> np.ndarray:
    """Spreads column weights over the groups; a group whose columns all weigh nothing counts them alike."""
    spread = np.pad(metric, (0, groups * width - len(metric))).reshape(groups, width)
    spread = np.where(spread.any(axis=1, keepdims=True), spread, np.float32(1))
    spread /= spread.max(axis=1, keepdims=True)
    return _grouped(np.tile(spread, (rows, 1)).reshape(rows, -1), groups, width, axis)


def stored_scale(scale: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """Rounds scales to their storage type, never to zero."""
    kind = np.finfo(dtype.numpy())
    largest = float(np.abs(scale).max())
    if largest > float(kind.max):
        raise InputError(
            f"Expected scales of {name!r} up to {float(kind.max):.3g}, the largest number that {dtype.name} holds; "
            f"found {largest:.3g}. Store its scales in f32."
        )
    tiny = kind.smallest_subnormal
    return np.copysign(np.maximum(np.abs(scale), tiny), scale).astype(dtype.numpy())

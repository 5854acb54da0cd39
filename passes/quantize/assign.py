"""Chooses the codes of a weight. Knows formats and a metric, nothing of storage or graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.quant import Affine, FloatScale, Format, QuantizedTensor
from qc.passes.quantize._fit import fit_scales, spread
from qc.passes.quantize._remainder import assign_with_remainder
from qc.passes.quantize._search import Search, search

__all__ = ["Search", "assign", "run_parallel", "sqnr_db", "squared_errors"]

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
    """Quantizes a weight by the default of its format: the least squared error of each group over its parameters.

    Of affine formats that is a search over scale and zero point; `qc.passes.quantize._fit` has the others. Scales are
    rounded to their storage type first, codes are the nearest to ``w / scale`` (ties to even) after that.
    A group of zeros gets scale 1 and codes that decode to zero; the last group of a row may be shorter. Temporary
    memory is a few MiB per thread. The result does not depend on the number of threads.

    Args:
        weight: ``[N, K]`` of any float type; converted a few rows at a time, so it may be a map of a file.
        format: What the codes shall mean.
        metric: Non-negative weights of squared errors: ``[K]`` for columns, such as ``E[x_k^2]``, or ``[N, K]`` for
            single elements, such as their Fisher information; None for one.
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
        if metric.shape not in ((columns,), (rows, columns)) or not np.all(np.isfinite(metric)) or np.any(metric < 0):
            raise InputError(
                f"Expected finite non-negative weights of {columns} columns or {rows} x {columns} elements for "
                f"{name!r}, found shape {list(metric.shape)}."
            )
    effort = Search() if effort is None else effort
    plan = _plain(format)
    if format.remainder is not None:

        def dense(part: np.ndarray, format: Format, columns: np.ndarray | None) -> QuantizedTensor:
            weights = metric if metric is None or columns is None else metric[..., columns]
            return assign(part, format, weights, name=name, threads=threads, effort=effort)

        return assign_with_remainder(weight, format, metric, dense)
    if plan is None:
        return _assign_in_two(weight, format, metric, name, threads, effort)
    tensor = QuantizedTensor(
        format,
        np.empty((rows, columns), np.int8 if plan.values.symmetric else np.uint8),
        {
            s.name: np.empty(s.shape, plan.scale.numpy() if s.name == "scale" else np.uint8)
            for s in format.streams((rows, columns))
            if s.name != "codes"
        },
    )

    def work(start: int) -> None:
        _assign_rows(weight, tensor, plan, slice(start, start + step), metric, name, effort)

    step = _rows_per_chunk(columns)
    run_parallel(work, range(0, rows, step), threads)
    return tensor


@dataclasses.dataclass(frozen=True)
class _Plain:
    """What most weights become: integer codes on an affine grid with float scales, so that one pass over them does."""

    values: Affine
    scale: ir.DataType


def _plain(format: Format) -> _Plain | None:
    values, scale = format.values, format.scale
    if not isinstance(values, Affine) or not isinstance(scale, FloatScale) or format.axis != "in":
        return None
    return None if values.half or values.floating else _Plain(values, scale.dtype)


def _assign_in_two(
    weight: np.ndarray, format: Format, metric: np.ndarray | None, name: str, threads: int, effort: Search
) -> QuantizedTensor:
    """First the parameters of all groups, then codes for what is stored of them: scales may depend on one another."""
    source = weight.T if format.axis == "out" else weight
    if format.axis == "tensor" or any(p.scope != "group" for p in format.values.params):
        step = len(source)
    else:
        step = _rows_per_chunk(source.shape[1])
    if metric is not None and format.axis == "out":
        metric = metric[:, None] if metric.ndim == 1 else metric.T

    def find(start: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        w = _finite(source[start : start + step], name, start)
        importance = metric if metric is None or metric.ndim == 1 else metric[start : start + step]
        if format.axis == "tensor":
            importance = None if importance is None else np.broadcast_to(importance, w.shape).reshape(-1)
            w = w.reshape(1, -1)
        return fit_scales(format, w, importance, effort)

    starts = range(0, len(source), step)
    found = run_parallel(find, starts, threads)
    params = format.scale.encode(np.concatenate([scale for scale, _ in found]), name)
    params |= {key: np.concatenate([p[key] for _, p in found]) for key in found[0][1]}
    by_row = {s.name: s.by_row for s in format.streams(weight.shape)}

    def project(start: int) -> np.ndarray:
        part = slice(start, start + step)
        held = {key: array[part] if by_row[key] else array for key, array in params.items()}
        w = np.asarray(weight[part] if format.axis == "in" else weight, np.float32)
        return format.nearest(w, held)

    codes = run_parallel(project, starts if format.axis == "in" else range(1), threads)
    return QuantizedTensor(format, np.concatenate(codes), params)


def _finite(part: np.ndarray, name: str, first: int) -> np.ndarray:
    w = np.asarray(part, np.float32)
    if not np.all(np.isfinite(w)):
        raise InputError(
            f"Expected finite numbers in weight {name!r}, found NaN, infinity or a number that overflows float32 from "
            f"row {first} on. Repair the model, or exclude this weight."
        )
    return w


def sqnr_db(weight: np.ndarray, tensor: QuantizedTensor, *, threads: int = 1) -> float:
    """Signal to quantization noise ratio of a quantized weight in decibels, infinite if it is exact.

    Args:
        weight: ``[N, K]``, any float type.
        tensor: What it became.
        threads: Number of threads.
    """
    signal, noise = squared_errors(weight, tensor, None, threads=threads)
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def squared_errors(
    weight: np.ndarray, tensor: QuantizedTensor, metric: np.ndarray | None, *, threads: int = 1
) -> tuple[float, float]:
    """Sums of squares of a weight, and of its difference to what it became.

    Args:
        weight: ``[N, K]``, any float type.
        tensor: What it became.
        metric: What a square counts, ``[K]`` by column or ``[N, K]``; None for one.
        threads: Number of threads.
    """
    rows, columns = weight.shape
    step = _rows_per_chunk(columns) if tensor.sliceable else rows
    root = None if metric is None else np.sqrt(metric).astype(np.float32)

    def work(start: int) -> tuple[float, float]:
        part = slice(start, start + step)
        w = np.asarray(weight[part], np.float32)
        noise = w - (tensor.rows(part) if tensor.sliceable else tensor).decode()
        if root is not None:
            own = root if root.ndim == 1 else root[part]
            w, noise = w * own, noise * own
        return float(np.vdot(w, w)), float(np.vdot(noise, noise))

    signal, noise = np.sum(run_parallel(work, range(0, rows, step), threads), axis=0)
    return float(signal), float(noise)


def _rows_per_chunk(columns: int) -> int:
    return max(1, _CHUNK // columns)


def run_parallel(work: Callable[[int], _T], starts: range, threads: int) -> list[_T]:
    """What `work` returns for each of `starts`, in order."""
    if threads <= 1 or len(starts) == 1:
        return [work(start) for start in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, starts))


def _assign_rows(
    weight: np.ndarray,
    tensor: QuantizedTensor,
    plan: _Plain,
    part: slice,
    metric: np.ndarray | None,
    name: str,
    effort: Search,
) -> None:
    format, codes, values = tensor.format, tensor.codes[part], plan.values
    columns = codes.shape[1]
    groups = format.groups(columns)
    width = columns if format.group is None else format.group
    axis = 0 if width <= _LONGEST_TRANSPOSED else 1
    w = _grouped(np.asarray(weight[part], np.float32), groups, width, axis)
    importance = None
    if metric is not None:
        own = metric[None] if metric.ndim == 1 else metric[part]
        importance = _grouped(
            np.broadcast_to(spread(own, groups, width), (len(codes), groups * width)), groups, width, axis
        )
    found = search(w, values, axis, importance, effort)
    if found is None:
        raise InputError(
            f"Expected finite numbers in weight {name!r}, found NaN, infinity or a range that overflows float32 in "
            f"rows {part.start} to {part.start + len(codes) - 1}. Repair the model, or exclude this weight."
        )
    scale = format.scale.encode(found.scale, name)["scale"]
    unit = scale.astype(np.float32)
    np.rint(np.divide(w, unit, out=w), out=w)
    if not values.symmetric:
        w += found.zero
        tensor.params["zero_point"][part] = found.zero.astype(np.uint8).reshape(-1, groups)
    np.clip(w, values.low, values.high, out=w)
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

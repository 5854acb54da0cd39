"""Reductions, softmax, sorting and scans along an axis for the torch executor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qc.ir._torch_ops import Call, op

Tensor = torch.Tensor


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return x.mean(dims, keep) if x.is_floating_point() else x.double().mean(dims, keep).to(x.dtype)


def _norm(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, dims, keep)
    return torch.linalg.vector_norm(x.double(), 2, dims, keep).to(x.dtype)


def _extreme(reduce: Callable[..., Tensor], empty: float) -> Callable[[Tensor, list[int], bool], Tensor]:
    def run(x: Tensor, dims: list[int], keep: bool) -> Tensor:
        if x.numel() > 0:
            return reduce(x, dims, keepdim=keep)
        if x.dtype == torch.bool:
            value: float = empty > 0
        else:
            info = None if x.is_floating_point() else torch.iinfo(x.dtype)
            value = empty if info is None else (info.max if empty > 0 else info.min)
        return torch.full_like(torch.sum(x, dims, keepdim=keep), value, dtype=x.dtype)

    return run


_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extreme(torch.amax, -torch.inf),
    "ReduceMin": _extreme(torch.amin, torch.inf),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, dims, keep: _sum(x.abs(), dims, keep),
    "ReduceL2": _norm,
    "ReduceSumSquare": lambda x, dims, keep: _sum(x * x, dims, keep),
    "ReduceLogSum": lambda x, dims, keep: torch.log(_sum(x, dims, keep)),
    "ReduceLogSumExp": torch.logsumexp,
}


def _reduction(reduce: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = call.ints(axes, "axes") or []
        if not dims and call.attr("noop_with_empty_axes", 0):
            return x
        dims = dims or list(range(x.dim()))
        if not dims:
            return reduce(x.reshape(1), [0], False)
        return reduce(x, [d % x.dim() for d in dims], bool(call.attr("keepdims", 1)))

    return run


for _name, _function in _REDUCE.items():
    op(_name, host=(1,))(_reduction(_function))


def _arg(call: Call, x: Tensor, find: Callable[..., Tensor]) -> Tensor:
    axis, keep = call.attr("axis", 0) % max(x.dim(), 1), bool(call.attr("keepdims", 1))
    if call.attr("select_last_index", 0):
        return x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)
    return find(x, axis, keepdim=keep)


@op("ArgMax")
def _arg_max(call: Call, x: Tensor) -> Tensor:
    return _arg(call, x, torch.argmax)


@op("ArgMin")
def _arg_min(call: Call, x: Tensor) -> Tensor:
    return _arg(call, x, torch.argmin)


def _one_hot_max(x: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1.0)


_SOFTMAX: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": torch.softmax, "LogSoftmax": torch.log_softmax, "Hardmax": _one_hot_max,
}  # fmt: skip


def _flattened_softmax(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def run(call: Call, x: Tensor) -> Tensor:
        """Before opset 13 the axis cuts the shape in two, and the softmax is over all of the second part."""
        axis = call.attr("axis", 1) % x.dim()
        return function(x.reshape(x.shape[:axis].numel(), -1), 1).reshape(x.shape)

    return run


def _axis_softmax(function: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    return lambda call, x: function(x, call.attr("axis", -1))


for _name, _function in _SOFTMAX.items():
    op(_name)(_flattened_softmax(_function))
    op(_name, since=13)(_axis_softmax(_function))


@op("TopK", host=(1,))
def _top_k(call: Call, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Among equal values the one with the lower index comes first, so the sort is a stable one."""
    count = call.attr("k") if k is None else int(k)
    axis = call.attr("axis", -1)
    values, indices = torch.sort(x, dim=axis, descending=bool(call.attr("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _scan(call: Call, x: Tensor, axis: Tensor, accumulate: Callable[..., Tensor], neutral: int) -> Tensor:
    dim = int(axis) % max(x.dim(), 1)
    x = x.flip(dim) if call.attr("reverse", 0) else x
    if call.attr("exclusive", 0):
        x = torch.cat([torch.full_like(x.narrow(dim, 0, 1), neutral), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    y = accumulate(x, dim, dtype=x.dtype)
    return y.flip(dim) if call.attr("reverse", 0) else y


@op("CumSum", host=(1,))
def _cum_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _scan(call, x, axis, torch.cumsum, 0)


@op("CumProd", host=(1,))
def _cum_prod(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _scan(call, x, axis, torch.cumprod, 1)

"""Control flow for the torch executor: operators whose attributes are subgraphs."""

from __future__ import annotations

import torch

from qc.ir._torch_ops import Call, op
from qc.ir.errors import InternalError

Tensor = torch.Tensor


def _body(call: Call, name: str, inputs: list[Tensor]) -> list[Tensor]:
    if call.body is None:
        raise InternalError(f"node {call.node.name!r} was planned without its subgraphs")
    return call.body(name, inputs)


@op("If", host=(0,))
def _if(call: Call, condition: Tensor) -> tuple[Tensor, ...]:
    return tuple(_body(call, "then_branch" if bool(condition) else "else_branch", []))


@op("Loop", host=(0, 1))
def _loop(
    call: Call, trips: Tensor | None = None, condition: Tensor | None = None, *carried: Tensor
) -> tuple[Tensor, ...]:
    """Runs the body while its condition holds, at most `trips` times; further outputs are stacked over iterations."""
    limit = None if trips is None else int(trips)
    alive = condition is None or bool(condition)
    state, count, rows = list(carried), 0, []
    while alive and (limit is None or count < limit):
        flag, *results = _body(call, "body", [torch.tensor(count), torch.tensor(True), *state])
        alive, state = bool(flag), results[: len(carried)]
        rows.append(results[len(carried) :])
        count += 1
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    if not rows:
        stacked = [_empty(call, value) for value in call.attr("body").outputs[1 + len(carried) :]]
    return (*state, *stacked)


def _empty(call: Call, value: object) -> Tensor:
    """The stack of no iterations: zero rows of the shape the body declares, unknown extents as zero."""
    dims = [d if isinstance(d, int) else 0 for d in value.shape] if value.shape is not None else []  # type: ignore[attr-defined]
    dtype = call.context.torch_dtype(value.dtype)  # type: ignore[attr-defined]
    return torch.zeros(0, *dims, dtype=dtype, device=call.context.device)


@op("Scan", since=9)
def _scan(call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Carries a state over slices of the scanned inputs; the body's further outputs are stacked."""
    scanned = call.attr("num_scan_inputs")
    state, sources = list(inputs[: len(inputs) - scanned]), inputs[len(inputs) - scanned :]
    axes, backward = call.attr("scan_input_axes", [0] * scanned), call.attr("scan_input_directions", [0] * scanned)
    steps = sources[0].shape[axes[0]]
    rows = []
    for i in range(steps):
        parts = [x.select(a, steps - 1 - i if b else i) for x, a, b in zip(sources, axes, backward, strict=True)]
        results = _body(call, "body", [*state, *parts])
        state = results[: len(state)]
        rows.append(results[len(state) :])
    columns = [list(column) for column in zip(*rows, strict=True)]
    zeros = [0] * len(columns)
    into, reverse = call.attr("scan_output_axes", zeros), call.attr("scan_output_directions", zeros)
    stacked = [torch.stack(c[::-1] if r else c, a) for c, a, r in zip(columns, into, reverse, strict=True)]
    return (*state, *stacked)

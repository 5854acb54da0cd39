"""What ``qc inspect`` knows about a model: where its bytes are, its blocks, its channel groups, its outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.blocks import find_blocks
from qc.ir.channels import find_groups
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.probe import find_inputs
from qc.ir.quant import read_weight
from qc.ir.runtime import Session
from qc.passes.base import site_name

__all__ = ["blocks", "groups", "outliers", "sizes"]


def sizes(model: Model) -> dict[str, object]:
    """Lists the stored tensors, the largest first.

    Returns:
        ``{"total_bytes", "tensors": [{"name", "dtype", "shape", "bytes", "share", "used_by"}]}``.
    """
    rows = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        rows.append(
            {
                "name": name,
                "dtype": tensor.dtype.name.lower(),
                "shape": [int(d) for d in tensor.shape],
                "bytes": tensor.nbytes,
                "used_by": ", ".join(sorted({f"{n.domain or 'onnx'}::{n.op_type}" for n, _ in value.uses()})),
            }
        )
    total = sum(r["bytes"] for r in rows)
    for row in rows:
        row["share"] = row["bytes"] / total if total else 0.0
    rows.sort(key=lambda r: (-r["bytes"], r["name"]))
    return {"total_bytes": total, "tensors": rows}


def blocks(model: Model) -> dict[str, object]:
    """Describes the segments of the main graph in order of execution.

    Returns:
        ``{"runs": [number of blocks, ...], "blocks": [{"label", "kind", "run", "index", "nodes", "weight_bytes",
        "inputs", "outputs"}]}``.
    """
    found = find_blocks(model.graph)
    return {
        "runs": [len(run) for run in found.runs],
        "blocks": [
            {
                "label": s.label,
                "kind": s.kind,
                "run": s.run,
                "index": s.index,
                "nodes": len(s.nodes),
                "weight_bytes": sum(w.const_value.nbytes for w in s.weights if w.const_value is not None),
                "inputs": [v.name for v in s.inputs],
                "outputs": [v.name for v in s.outputs],
            }
            for s in found.segments
        ],
    }


def groups(model: Model) -> dict[str, object]:
    """Lists the channel groups of a canonical model: what may be done to the channels of which tensors.

    Returns:
        ``{"groups": [...], "coverage": {...}, "drawing": str}``: `qc.ir.channels.ChannelGroups.describe`, the share of
        the weights whose input channels may be scaled and the operators that forbid the rest, and a Mermaid drawing.
    """
    found = find_groups(model)
    return {"groups": found.describe(), "coverage": found.coverage(), "drawing": found.drawing()}


def outliers(model: Model, batches: Sequence[Mapping[str, np.ndarray]] | None = None) -> dict[str, object]:
    """Measures, at the input of every matrix product, how far single channels stand out.

    The model is run by the verifying runtime. A ratio of 1 means that all channels have the same range; from about 10
    on, one scale for all channels costs most of 8 bits.

    Args:
        model: A canonical model.
        batches: Inputs to measure on; None makes random ones.

    Returns:
        ``{"sites": [{"site", "channels", "absmax", "ratio", "worst_channels", "weight_ratio"}]}``, the worst ratio
        first: ``ratio`` is the largest channel absmax over their median, for the activation, and ``weight_ratio`` the
        same over the input channels of the weight.
    """
    probe = model.clone()
    products = [n for n in probe.graph if dialect.is_op(n, "Linear") and read_weight(n.inputs[1]) is not None]
    returned = set(probe.graph.outputs) | set(probe.graph.inputs)
    watched = list(dict.fromkeys(n.inputs[0] for n in products if n.inputs[0] not in returned))
    probe.graph.outputs.extend(watched)
    session = Session(probe)
    if batches is None:
        found = find_inputs(model, session.run)
        if found.obstacle:
            raise UnsupportedError(f"Cannot look for outliers in this model: {found.obstacle}.")
        batches, outputs = found.batches, found.outputs
    else:
        outputs = list(map(session.run, batches))
    absmax: dict[str, np.ndarray] = {}
    for batch, values in zip(batches, outputs, strict=True):
        results = values | dict(batch)
        for node in products:
            name = _name(node.inputs[0])
            channels = np.abs(results[name]).reshape(-1, results[name].shape[-1]).max(axis=0)
            absmax[name] = np.maximum(absmax.get(name, 0.0), channels)
    rows = [_site(node, absmax[_name(node.inputs[0])]) for node in products]
    rows.sort(key=lambda r: -r["ratio"])
    return {"sites": rows}


def _site(node: ir.Node, channels: np.ndarray) -> dict:
    weight = read_weight(node.inputs[1])
    assert weight is not None
    columns = np.abs(weight.numpy()).max(axis=0)
    return {
        "site": site_name(node),
        "channels": int(channels.size),
        "absmax": float(channels.max()),
        "ratio": _ratio(channels),
        "worst_channels": [int(c) for c in np.argsort(-channels, kind="stable")[:4]],
        "weight_ratio": _ratio(columns),
    }


def _ratio(values: np.ndarray) -> float:
    median = float(np.median(values))
    return float(values.max()) / median if median > 0 else float("inf")


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name

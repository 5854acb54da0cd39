"""The texts of the web kit: the types of inputs and outputs in TypeScript."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from qc.backends.kits.facts import Facts
from qc.backends.kits.vendor import VENDOR
from qc.ir.model import ANY_SHAPE, Port

__all__ = ["texts"]

_ARRAYS = {
    ir.DataType.FLOAT: "Float32Array",
    ir.DataType.DOUBLE: "Float64Array",
    ir.DataType.FLOAT16: "Uint16Array",
    ir.DataType.INT64: "BigInt64Array",
    ir.DataType.UINT64: "BigUint64Array",
    ir.DataType.INT32: "Int32Array",
    ir.DataType.UINT32: "Uint32Array",
    ir.DataType.INT16: "Int16Array",
    ir.DataType.UINT16: "Uint16Array",
    ir.DataType.INT8: "Int8Array",
    ir.DataType.UINT8: "Uint8Array",
    ir.DataType.BOOL: "Uint8Array",
    ir.DataType.STRING: "string[]",
}
"""What a tensor of onnxruntime-web holds its numbers in."""


def texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """The texts that depend on the model."""
    return {
        "input_types": _members(facts.signature.inputs),
        "output_types": _members(facts.signature.outputs),
        "modules": "vendor" if (directory / VENDOR).is_dir() else "node_modules",
        "first_input": facts.signature.inputs[0].name,
    }


def _members(ports: Sequence[Port]) -> str:
    return "\n".join(_member(p) for p in ports)


def _member(port: Port) -> str:
    shape = "any" if port.shape == ANY_SHAPE else ", ".join("?" if d is None else str(d) for d in port.shape)
    array = _ARRAYS.get(port.dtype, "ArrayLike<number>")
    optional = "?" if port.kind == "optional" else ""
    return f"  /** `{port.role}` [{shape}] */\n  {json.dumps(port.name)}{optional}: Tensor<{array}>;"

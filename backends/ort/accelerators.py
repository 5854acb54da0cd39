"""What the accelerators of phones would take of a model, by the rules that come with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from qc.ir.model import Model

__all__ = ["accelerators"]

_SMALL = 1024  # bytes; constants that shape inference may read


def accelerators(model: Model) -> Sequence[Mapping[str, Any]]:
    """Asks ONNX Runtime's mobile usability checker about a lowered model; no weight is read.

    Returns:
        For NNAPI and both forms of Core ML: ``name``; ``as_is`` and, if shapes are dynamic, ``fixed_shapes``, each with
        the ``nodes`` it would take, of how many (``of``), in how many ``partitions``, and the checker's ``verdict``
        (yes, maybe, no); ``unsupported`` operators.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    proto = onnx.shape_inference.infer_shapes(_without_weights(model))
    dynamic = bool(checker.check_shapes(proto.graph)[0])
    return [_asked(name, check, proto, dynamic) for name, check in _checks(checker).items()]


def _checks(checker: Any) -> dict[str, Callable[[onnx.ModelProto, bool], Any]]:
    def coreml(rules: str) -> Callable[[onnx.ModelProto, bool], Any]:
        return lambda proto, fixed: checker.check_coreml_partitions(proto, fixed, rules)

    return {
        "NNAPI": checker.check_nnapi_partitions,
        "Core ML, neural network": coreml("coreml_supported_neuralnetwork_ops.md"),
        "Core ML, ML program": coreml("coreml_supported_mlprogram_ops.md"),
    }


def _asked(name: str, check: Callable[[Any, bool], Any], proto: onnx.ModelProto, dynamic: bool) -> dict[str, Any]:
    found = check(proto, dynamic)
    answer = {"name": name, "as_is": _figures(found), "unsupported": sorted(found.unsupported_ops)}
    return {**answer, "fixed_shapes": _figures(check(proto, False))} if dynamic else answer


def _figures(found: Any) -> dict[str, Any]:
    return {
        "nodes": found.num_supported_nodes,
        "of": found.num_nodes,
        "partitions": found.num_partitions,
        "verdict": found.suitability().name.lower() if found.num_nodes else "no",
    }


def _without_weights(model: Model) -> onnx.ModelProto:
    """The graph as ONNX has it, its large tensors elsewhere."""
    clone = model.clone()
    for graph in clone.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes > _SMALL:
                value.const_value = ir.ExternalTensor(
                    "elsewhere", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name or ""
                )
    return ir.to_proto(clone)

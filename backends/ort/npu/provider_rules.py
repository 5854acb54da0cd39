"""The operators that the providers of phones take, and in which forms.

Which operators there are is in the lists that come with ONNX Runtime (``coreml_supported_mlprogram_ops.md``,
``nnapi_supported_ops.md``); what they must be given is in the checks in the source of the providers (``op_builder`` of
each operator). Operators that are not in the lists are not here, so that a newer runtime takes no less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qc.backends.ort.npu.rules import Provider, Rule

__all__ = ["PROVIDERS"]

_FLOAT, _HALF, _BYTE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)

_FLOATS = (_FLOAT, _HALF)


def _alike(names: str, *rules: Rule) -> dict[str, Sequence[Rule]]:
    return dict.fromkeys(names.split(), rules)


_COREML: Mapping[str, Sequence[Rule]] = {
    **_alike(
        "Add Ceil Clip Concat Cos Div Elu Erf Exp Gelu HardSigmoid Identity LeakyRelu Max Mul PRelu Reciprocal Relu "
        "Round Sigmoid Sin Softmax Softplus Sqrt Sub Tanh",
        Rule(_FLOATS),
    ),
    **_alike("AveragePool MaxPool GlobalAveragePool GlobalMaxPool", Rule(_FLOATS, ranks=(4, 4))),
    **_alike("ReduceMax ReduceMean ReduceSum Squeeze Unsqueeze Split Reshape Transpose", Rule(_FLOATS, constants=(1,))),
    "And": [Rule((ir.DataType.BOOL,))],
    "Cast": [Rule((*_FLOATS, ir.DataType.INT32, ir.DataType.BOOL), produced=True)],
    "Conv": [Rule(_FLOATS, ranks=(3, 4), constants=(1, 2))],
    "ConvTranspose": [
        Rule(
            _FLOATS,
            ranks=(3, 4),
            constants=(1, 2),
            attributes={"auto_pad": ("NOTSET", "VALID"), "output_shape": (None,), "output_padding": (None,)},
        )
    ],
    "DepthToSpace": [Rule(_FLOATS, ranks=(4, 4), attributes={"mode": ("DCR", "CRD")})],
    "GatherND": [Rule(_FLOATS, attributes={"batch_dims": (0,)})],
    "Gemm": [
        Rule(_FLOATS, ranks=(2, 2), constants=(1, 2), attributes={"transA": (0,), "alpha": (1.0,), "beta": (1.0,)})
    ],
    "GridSample": [Rule(_FLOATS, ranks=(4, 4), attributes={"mode": ("linear", "bilinear", "zeros")})],
    "GroupNormalization": [Rule(_FLOATS, constants=(1, 2), attributes={"stash_type": (1,)})],
    "InstanceNormalization": [Rule(_FLOATS, constants=(1, 2))],
    "LayerNormalization": [Rule(_FLOATS, constants=(1, 2), attributes={"stash_type": (1,)})],
    "MatMul": [Rule(_FLOATS)],
    "Pow": [Rule((_FLOAT,))],
    "Resize": [
        Rule(_FLOATS, ranks=(3, 5), constants=(2, 3), attributes={"antialias": (0,), "mode": ("nearest", "linear")})
    ],
    "Shape": [Rule((*_FLOATS, ir.DataType.INT32))],
    "Slice": [Rule(_FLOATS, constants=(1, 2, 3, 4))],
    "Tile": [Rule(_FLOATS)],
    "Where": [Rule((ir.DataType.BOOL,))],
    "com.microsoft::QuickGelu": [Rule(_FLOATS)],
}

_CODES = Rule(quantized=True, ranks=(0, 4))

_NNAPI: Mapping[str, Sequence[Rule]] = {
    **_alike("Abs Cast Clip Div Elu Exp Floor Identity LeakyRelu Log Max Min Neg Pow PRelu", Rule(ranks=(0, 4))),
    **_alike("Relu Sigmoid Sin Sqrt Sub Tanh", Rule(ranks=(0, 4))),
    **_alike("Add Concat Mul Transpose", Rule(ranks=(0, 4)), _CODES),
    **_alike("GlobalAveragePool GlobalMaxPool MaxPool", Rule(ranks=(4, 4))),
    "AveragePool": [Rule(ranks=(4, 4)), Rule(ranks=(4, 4), quantized=True)],
    "BatchNormalization": [Rule(ranks=(0, 4), constants=(1, 2, 3, 4))],
    "Conv": [
        Rule(ranks=(4, 4), constants=(1, 2)),
        Rule(ranks=(4, 4), quantized=True, per_channel=True),
    ],
    "DepthToSpace": [Rule(ranks=(4, 4), attributes={"mode": ("DCR",)})],
    "DequantizeLinear": [Rule((_BYTE,), ranks=(0, 4), constants=(1, 2), per_tensor=True)],
    "Flatten": [Rule(ranks=(0, 4))],
    "Gather": [Rule(ranks=(0, 4))],
    "Gemm": [
        Rule(ranks=(2, 2), constants=(1,), attributes={"transA": (0,), "alpha": (1.0,), "beta": (1.0,)}),
        Rule(ranks=(2, 2), quantized=True),
    ],
    "LRN": [Rule(ranks=(4, 4))],
    "MatMul": [
        Rule(ranks=(2, 2), constants=(1,)),
        Rule(ranks=(3, 4), batches=True),
        Rule(ranks=(2, 2), quantized=True),
    ],
    "Pad": [Rule(ranks=(0, 4), constants=(1, 2), attributes={"mode": ("constant",)})],
    "QuantizeLinear": [Rule(ranks=(0, 4), constants=(1, 2), per_tensor=True)],
    "ReduceMean": [Rule(ranks=(1, 4), constants=(1,))],
    "Reshape": [Rule(ranks=(0, 4), constants=(1,)), _CODES],
    "Resize": [Rule(ranks=(4, 4), constants=(2, 3))],
    "Slice": [Rule(ranks=(0, 4), constants=(1, 2, 3, 4))],
    "Softmax": [
        Rule(ranks=(2, 2)),
        Rule(ranks=(4, 4)),
        Rule(ranks=(2, 4), quantized=True, scale=1 / 256),
    ],
    "Split": [Rule(ranks=(0, 4), constants=(1,))],
    "Squeeze": [Rule(ranks=(0, 4), constants=(1,))],
    "Unsqueeze": [Rule(ranks=(0, 4), constants=(1,))],
}

PROVIDERS = {
    "coreml": Provider("Core ML", _COREML),
    "nnapi": Provider("NNAPI", _NNAPI),
}
"""By the kind of the target."""

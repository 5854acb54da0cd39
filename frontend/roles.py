"""Roles of graph inputs and outputs, guessed from the names that exporters agree on, checked by type and rank.

Only names are known here, never models. What is not recognised is ``other``.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from qc.ir.model import set_role

__all__ = ["assign_roles"]

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_MASKS = _INTEGERS | _FLOATS | {ir.DataType.BOOL}

# name pattern -> role, allowed element types, allowed ranks
_INPUTS = (
    (r"input_ids", "tokens", _INTEGERS, {1, 2}),
    (r"attention_mask", "mask", _MASKS, {2}),
    (r"position_ids", "positions", _INTEGERS, {1, 2}),
    (r"token_type_ids", "token_types", _INTEGERS, {2}),
    (r"pixel_values", "pixels", _FLOATS, {3, 4}),
    (r"decoder_input_ids", "decoder_tokens", _INTEGERS, {2}),
    (r"decoder_attention_mask", "decoder_mask", _MASKS, {2}),
    (r"past_key_values?\.(\d+)\.key", "past_key", _FLOATS, {4}),
    (r"past_key_values?\.(\d+)\.value", "past_value", _FLOATS, {4}),
)
_OUTPUTS = (
    (r"logits|start_logits|end_logits|logits_per_\w+", "logits", _FLOATS, {1, 2, 3, 4}),
    (r"last_hidden_state", "hidden", _FLOATS, {3, 4}),
    (r"pooler_output", "pooled", _FLOATS, {2, 4}),
    (r"(?:text|image|sentence)_embed(?:s|ding|dings)", "embedding", _FLOATS, {2}),
    (r"present(?:_key_values)?\.(\d+)\.key", "present_key", _FLOATS, {4}),
    (r"present(?:_key_values)?\.(\d+)\.value", "present_value", _FLOATS, {4}),
)


def assign_roles(model: ir.Model) -> None:
    """Sets ``qc.role`` on every graph input and output that has none yet."""
    for value in model.graph.inputs:
        if "qc.role" not in value.metadata_props:
            set_role(value, _role(value, _INPUTS) if value.shape is not None else "other")
    for value in model.graph.outputs:
        if "qc.role" not in value.metadata_props:
            set_role(value, _role(value, _OUTPUTS))


def _role(value: ir.Value, table: tuple) -> str:
    rank = None if value.shape is None else value.shape.rank()
    for pattern, role, dtypes, ranks in table:
        match = re.fullmatch(pattern, value.name or "")
        if match and value.dtype in dtypes and (rank is None or rank in ranks):
            return f"{role}.{match[1]}" if match.groups() else role
    return "other"

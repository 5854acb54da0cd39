"""Fixtures of the fusions' tests: small graphs from text, and the promises that every fusion keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.model import Model, set_role
from qc.ir.runtime import Session
from qc.ir.verify import compare
from qc.passes.base import Exact, Outcome, Pass, Result

_HEADER = '<ir_version: 10, opset_import: ["" : 23, "qc" : 1]>'


@pytest.fixture
def build() -> Callable[..., Model]:
    """``build(text, roles, w=array)``: a model from ONNX text; the named graph inputs become initializers."""

    def make(text: str, roles: Mapping[str, str] | None = None, **weights: np.ndarray) -> Model:
        model = ir.from_onnx_text(_HEADER + text)
        for value in tuple(model.graph.inputs):
            if value.name in weights:
                model.graph.inputs.remove(value)
                value.const_value = ir.tensor(weights[value.name])
                value.shape = ir.Shape(weights[value.name].shape)
                value.type = ir.TensorType(value.const_value.dtype)
                model.graph.register_initializer(value)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if (role := (roles or {}).get(value.name or "")) is not None:
                set_role(value, role)
        dialect.sync_functions(model)
        return Model.of(_with_shapes(model))

    return make


def _with_shapes(model: ir.Model) -> ir.Model:
    from onnx_ir.passes import common

    return common.ShapeInferencePass()(model).model


@pytest.fixture
def keeps() -> Callable[..., Result]:
    """``keeps(pass, model, feeds)``: runs a pass and checks it against its contract, on each of the feeds."""

    def check(rewrite: Pass, model: Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> Result:
        before = [Session(model).run(feed) for feed in feeds]
        names = [v.name for v in model.graph.outputs]
        result = rewrite(model)
        assert isinstance(result, Result)
        assert [v.name for v in model.graph.outputs] == names
        assert isinstance(rewrite.contract, Exact)
        for feed, old in zip(feeds, before, strict=True):
            for optimize in (False, True):
                for difference in compare(old, Session(model, optimize=optimize).run(feed)):
                    assert difference.max_abs <= rewrite.contract.tol * difference.scale + 1e-6, difference
        assert result.modified == any(s.outcome is Outcome.CHANGED for s in result.sites)
        assert not rewrite(model).modified, "a second run must find nothing to do"
        return result

    return check

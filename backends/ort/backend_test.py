from __future__ import annotations

import numpy as np
import pytest

from qc.backends.ort.backend import OrtCpu
from qc.backends.ort.web import OrtWeb
from qc.backends.target import backend_for
from qc.ir import dialect
from qc.ir.model import Model
from qc.ir.probe import probe_inputs
from qc.ir.quant import Format
from qc.ir.runtime import Session
from qc.ir.verify import STAGES, check_structure, compare
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import parse_pipeline


def _lowered(
    model: Model, recipe: str = "", backend: OrtCpu | None = None
) -> tuple[Model, list[dict[str, np.ndarray]]]:
    """The lowered model, and what it should compute on the probe."""
    model, _ = PassManager(canonicalize_passes()).run(model)
    if recipe:
        model, _ = PassManager(parse_pipeline(recipe)).run(model)
    expected = [Session(model).run(batch) for batch in probe_inputs(model)]
    model, _ = PassManager((backend or OrtCpu()).lowering(), stage="lowering").run(model)
    return model, expected


@pytest.mark.parametrize("kind", ["appending", "plain", "encoder"])
@pytest.mark.parametrize("recipe", ["", "quantize-weights{format=uint4,group=16}"])
def test_a_lowered_model_has_only_the_runtimes_operators_and_runs_as_before(build, tmp_path, kind, recipe):
    model = build(kind)
    batches = probe_inputs(model)
    lowered, expected = _lowered(model, recipe)
    check_structure(lowered, STAGES["lowered"])
    assert not any(key[0] == dialect.DOMAIN for key in lowered.functions)
    backend = backend_for("ort-cpu")
    backend.emit(lowered, tmp_path)
    runner = backend.open(tmp_path, threads=1)
    for batch, before in zip(batches, expected, strict=True):
        for difference in compare(before, runner.run(batch)):
            assert difference.sqnr > (25 if recipe else 100), difference


def test_all_nodes_of_a_quantized_model_are_on_target(build):
    lowered, _ = _lowered(build("encoder"), "quantize-weights{format=int4,group=32}")
    found = OrtCpu().coverage(lowered)
    assert found.off_target == 0
    assert "com.microsoft::MatMulNBits" in {n["op"] for n in found.nodes}


def test_the_target_lists_formats_that_parse_and_none_that_is_refused():
    formats = OrtCpu().target.formats
    assert "int4:g32" in formats
    assert "uint8" in formats
    assert "int2:g16" not in formats
    assert all(str(Format.parse(text)) == text for text in formats)
    assert not any(text.startswith(("int8", "uint8", "int2", "uint2")) for text in OrtCpu(0).target.formats)


@pytest.mark.parametrize("kind", ["appending", "encoder"])
def test_for_the_web_weights_without_integer_activations_are_decoded_at_load(build, kind):
    lowered, expected = _lowered(build(kind), "quantize-weights{format=uint4,group=16}", OrtWeb())
    found = OrtWeb().coverage(lowered)
    assert not {"com.microsoft::MatMulNBits", "DequantizeLinear"} & {n["op"] for n in found.nodes}
    assert found.off_target > 0
    assert all("float in memory" in n["reason"] for n in found.nodes if not n["on_target"])
    for batch, before in zip(probe_inputs(lowered), expected, strict=True):
        for difference in compare(before, Session(lowered).run(batch)):
            assert difference.sqnr > 100, difference


def test_for_the_web_integer_products_are_all_on_target(build):
    recipe = "quantize-weights{format=int8,group=0},quantize-activations{bits=8,granularity=tensor,mode=dynamic}"
    lowered, _ = _lowered(build("encoder"), recipe, OrtWeb())
    found = OrtWeb().coverage(lowered)
    assert found.off_target == 0
    assert "com.microsoft::MatMulIntegerToFloat" in {n["op"] for n in found.nodes}

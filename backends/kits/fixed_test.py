from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from qc.backends.kits.fixed import FixedFiles
from qc.backends.target import backend_for
from qc.ir.model import Model
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager


@pytest.mark.parametrize("kind", ["appending", "plain", "encoder"])
def test_the_steps_of_a_text_yield_what_the_runner_yields(build, tmp_path, kind):
    backend = backend_for("ort-npu:coreml,f32,length=12,prefill=4,cache=16")
    model, _ = PassManager([*canonicalize_passes()]).run(build(kind))
    model, _ = PassManager(backend.lowering(), stage="lowering").run(model)
    backend.emit(Model.of(model), tmp_path)
    spec = importlib.util.spec_from_file_location("steps", tmp_path / "python" / "steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    interface = json.loads((tmp_path / "python" / "interface.json").read_text())
    steps, runner = module.Steps(tmp_path, interface, 1), backend.open(tmp_path, threads=1)
    output = interface["outputs"][0]["name"]

    tokens = np.array([5, 9, 33, 60, 7, 12, 80, 3, 2])
    whole = {"input_ids": tokens, "position_ids": np.arange(9), "attention_mask": np.ones(9, np.int64)}
    whole = {p["name"]: whole[p["name"]][None] for p in interface["inputs"] if p["name"] in whole}
    empty = {
        p["name"]: np.zeros((1, 2, 0, 16), np.float32) for p in interface["inputs"] if p["role"].startswith("past_")
    }
    expected = runner.run({**whole, **empty})[output]
    found = steps.feed(whole, 9)[output]
    np.testing.assert_allclose(found, expected[:, -found.shape[1] :], atol=1e-5)
    assert found.shape[1] == {"appending": 1, "plain": 9, "encoder": 9}[kind], "of several pieces the last"
    assert steps.past == (9 if kind == "appending" else 0)
    steps.reset()
    np.testing.assert_array_equal(steps.feed(whole, 9)[output], found)


def test_what_graphs_are_compiled_to_stands_for_them(tmp_path):
    for name in ("decode.onnx", "decode_ctx.onnx", "decode_ctx_qnn.bin", "inputs.onnx", "report.html"):
        (tmp_path / name).touch()
    facts = {"unit": "qnn", "context": True, "graphs": [{"file": "decode.onnx", "new": 1}]}
    (tmp_path / "npu.json").write_text(json.dumps(facts))
    files = FixedFiles.of(tmp_path)
    assert files.graphs == [("decode_ctx.onnx", 1)]
    assert files.names == ["decode_ctx.onnx", "decode_ctx_qnn.bin", "inputs.onnx"]

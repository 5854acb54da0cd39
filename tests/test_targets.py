"""One compile for several targets: what it writes, what it shares, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qc
from qc.backends.target import split_targets
from qc.cli import main
from qc.ir.digest import digest_model
from qc.ir.errors import InputError, UnsupportedError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers, over rows of any number."""
    return _write(tmp_path / "model.onnx", "Relu", ["rows", 64])


def _write(file: Path, op_type: str, shape: list[int | str]) -> Path:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 96), np.float32), "v": rng.standard_normal((96, 32), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node(op_type, ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:-1], 32])
    held = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "net", [x], [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), file)
    return file


def _files(directory: Path) -> dict[str, str]:
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_each_artifact_is_the_same_as_one_compiled_alone(model: Path, tmp_path: Path) -> None:
    targets = ["ort-cpu", "ort-web"]
    done = qc.compile_all(model, tmp_path / "all", targets)
    assert list(done) == targets
    assert {done[t].report["summary"]["recipe"] for t in targets} == {"w4", "w8a8-dynamic"}, "each took its own recipe"
    for target in targets:
        alone = qc.compile(model, tmp_path / f"alone-{target}", target=target)
        assert alone.artifact is not None
        assert _files(tmp_path / "all" / target) == _files(alone.artifact.directory)


def test_targets_with_one_recipe_share_its_work(model: Path, tmp_path: Path) -> None:
    done = qc.compile_all(model, tmp_path / "all", ["ort-cpu", "ort-web"], recipe="w8")
    ours, theirs = ([r for r in d.reports if r.name == "quantize-weights"] for d in done.values())
    assert len(ours) == 1
    assert ours[0] is theirs[0]


def test_the_command_line_takes_a_list(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compile", str(model), "-o", str(out), "--target", "ort-cpu,ort-web", "--recipe", "w8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {t: d["artifact"] for t, d in data["targets"].items()} == {
        "ort-cpu": str(out / "ort-cpu"),
        "ort-web": str(out / "ort-web"),
    }
    assert main(["verify", str(out / "ort-web")]) == 0


def test_words_that_name_no_target_are_options() -> None:
    text = "tvm-cpu:avx2,float,ort-npu:qnn,8gen3,cache=512,ort-cpu"
    assert split_targets(text) == ["tvm-cpu:avx2,float", "ort-npu:qnn,8gen3,cache=512", "ort-cpu"]


def test_a_target_that_comes_twice_or_does_not_exist_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different targets"):
        qc.compile_all(model, tmp_path / "out", ["ort-cpu", "ort-cpu"])
    with pytest.raises(InputError, match="ort-gpu"):
        qc.compile_all(model, tmp_path / "out", ["ort-cpu", "ort-gpu"])
    assert not (tmp_path / "out").exists()


def test_what_was_complete_before_a_target_failed_stands(tmp_path: Path) -> None:
    model = _write(tmp_path / "model.onnx", "Relu", ["rows", "height", 64])
    with pytest.raises(UnsupportedError, match="height=SIZE"):
        qc.compile_all(model, tmp_path / "out", ["ort-cpu", "ort-npu:qnn"], recipe="w8")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ort-cpu"]
    assert main(["verify", str(tmp_path / "out" / "ort-cpu")]) == 0


def test_networks_on_an_npu_run_on_any_number_of_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_qnn", reason="the simulator comes with the extra npu, on Linux and Windows")
    done = qc.compile(model, tmp_path / "out", target="ort-npu:qnn")
    assert done.report["coverage"]["off_target"] == 0
    assert done.report["accuracy"]["cosine"] > 0.999
    assert not done.speed, "a simulator says nothing about speed"
    assert done.artifact is not None
    assert done.artifact.runner().run({"x": np.ones((5, 64), np.float32)})["y"].shape == (5, 32)
    others = {a["name"]: a["as_is"] for a in done.report["coverage"]["accelerators"]}
    assert others["NNAPI"]["nodes"] == others["NNAPI"]["of"], "shapes are fixed, and each operator is on its list"
    assert main(["inspect", str(tmp_path / "out")]) == 2
    assert "network.onnx" in capsys.readouterr().err


def test_a_model_that_is_given_stays_as_it_was(model: Path, tmp_path: Path) -> None:
    loaded = qc.load(model)
    before = digest_model(loaded)
    for out in (tmp_path / "one", tmp_path / "two"):
        qc.compile(loaded, out, recipe="w8")
    assert digest_model(loaded) == before

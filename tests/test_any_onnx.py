"""Any ONNX file that the runtime runs goes through a float compile unharmed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from any_onnx_models import CASES
from onnx import numpy_helper

import qc
from qc.cli import main
from qc.ir.errors import InputError, UnsupportedError

DATA = Path(onnx.backend.test.__file__).parent / "data"
SIMPLE = sorted(p.parent.name for p in (DATA / "simple").glob("*/model.onnx"))
LIGHT = sorted(p.stem for p in (DATA / "light").glob("*.onnx"))
LARGE = set(LIGHT) - {"light_shufflenet", "light_squeezenet"}
"""Those that take more than five seconds."""


def runtime(file: Path, inputs: Mapping[str, object]) -> tuple[list[str], list[object]]:
    """What ONNX Runtime makes of a file; raises what it raises."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    return [o.name for o in session.get_outputs()], session.run(None, dict(inputs))


def same(expected: object, found: object, tol: float) -> None:
    """Equal in structure, types and shapes; numbers within `tol` of the largest."""
    if isinstance(expected, list):
        assert isinstance(found, list)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            same(a, b, tol)
        return
    assert isinstance(expected, np.ndarray)
    assert isinstance(found, np.ndarray)
    assert (expected.dtype, expected.shape) == (found.dtype, found.shape)
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected)
        return
    scale = float(np.max(np.abs(expected), initial=1.0, where=np.isfinite(expected)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tol * scale)


def compiled(file: Path, out: Path) -> Path:
    """Compiles without quantization; returns the artifact's graph."""
    assert main(["compile", str(file), "-o", str(out), "--recipe", "float", "--json"]) == 0
    return out / "model.onnx"


def unharmed(file: Path, inputs: Mapping[str, object], out: Path, tol: float = 1e-4) -> None:
    """The artifact of a float compile has the outputs of the file, in order."""
    names, expected = runtime(file, inputs)
    graph = compiled(file, out)
    found_names, found = runtime(graph, inputs)
    assert found_names == names
    for a, b in zip(expected, found, strict=True):
        same(a, b, tol)


def data_set(model: onnx.ModelProto, directory: Path) -> dict[str, object]:
    """The inputs of one case of the ONNX test suite."""
    found: dict[str, object] = {}
    given = {i.name for i in model.graph.initializer}
    ports = [p for p in model.graph.input if p.name not in given]
    for port, file in zip(ports, sorted(directory.glob("input_*.pb")), strict=False):
        proto = onnx.TensorProto.FromString(file.read_bytes())
        found[port.name] = numpy_helper.to_array(proto)
    return found


@pytest.mark.parametrize("name", SIMPLE)
def test_a_simple_model_of_the_onnx_suite(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = DATA / "simple" / name / "model.onnx"
    inputs = data_set(onnx.load(file), file.parent / "test_data_set_0")
    try:
        runtime(file, inputs)
    except Exception:  # noqa: BLE001  the runtime's own kinds of error share no base
        assert main(["compile", str(file), "-o", str(tmp_path / "out"), "--recipe", "float"]) == 3
        said = capsys.readouterr().err
        assert "cannot be run" in said
        assert "Traceback" not in said
        return
    unharmed(file, inputs, tmp_path / "out")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in LIGHT]
)  # fmt: skip
def test_a_light_model_of_the_onnx_suite(name: str, tmp_path: Path) -> None:
    file = DATA / "light" / f"{name}.onnx"
    model = onnx.load(file)
    given = {i.name for i in model.graph.initializer}
    rng = np.random.default_rng(0)
    inputs = {
        p.name: rng.standard_normal([d.dim_value for d in p.type.tensor_type.shape.dim], np.float32)
        for p in model.graph.input
        if p.name not in given
    }
    unharmed(file, inputs, tmp_path / "out")


ODD = {"duplicate_node_names", "random_numbers", "sparse_initializer", "quantized_already"}
"""Those with a test of their own."""


@pytest.mark.parametrize("name", sorted(set(CASES) - ODD))
def test_an_odd_model(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name]()
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    unharmed(file, inputs, tmp_path / "out", tol=2e-3 if name == "half_precision" else 1e-4)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"sparse_initializer"}))
def test_an_odd_model_is_quantized_or_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    model, _ = CASES[name]()
    onnx.save(model, tmp_path / "model.onnx")
    with contextlib.suppress(UnsupportedError):  # nothing in it to quantize
        qc.compile(tmp_path / "model.onnx", tmp_path / "out", recipe="w4")
        assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("name", ["large_weights_inside_a_branch", "nested_subgraphs", "initializers_that_are_inputs"])
def test_weights_beside_the_graph_are_found_in_subgraphs_too(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name]()
    file = tmp_path / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="weights.bin", size_threshold=0)
    unharmed(file, inputs, tmp_path / "out")


def test_equal_node_names_which_the_runtime_refuses_are_told_apart(tmp_path: Path) -> None:
    model, inputs = CASES["duplicate_node_names"]()
    onnx.save(model, tmp_path / "model.onnx")
    graph = compiled(tmp_path / "model.onnx", tmp_path / "out")
    for node in model.graph.node:
        node.name = ""
    model.graph.name = "g"
    onnx.save(model, tmp_path / "named.onnx")
    same(runtime(tmp_path / "named.onnx", inputs)[1], runtime(graph, inputs)[1], 1e-4)


def test_a_model_that_draws_numbers_is_verified_in_structure_only(tmp_path: Path) -> None:
    model, inputs = CASES["random_numbers"]()
    onnx.save(model, tmp_path / "model.onnx")
    result = qc.compile(tmp_path / "model.onnx", tmp_path / "out", recipe="float")
    assert "random" in str(result.report["accuracy"])
    (noise,) = runtime(tmp_path / "out" / "model.onnx", inputs)[1]
    assert isinstance(noise, np.ndarray)
    assert noise.shape == (3, 4)
    assert float(np.abs(noise).max()) > 0


def test_a_model_that_runs_on_nothing_that_was_tried_says_so(tmp_path: Path) -> None:
    model, _ = CASES["runs_on_no_made_up_input"]()
    onnx.save(model, tmp_path / "model.onnx")
    result = qc.compile(tmp_path / "model.onnx", tmp_path / "out", recipe="w8")
    assert "only the structure was verified" in str(result.report["accuracy"]["measured_on"])  # type: ignore[index]


def test_a_model_with_quantized_weights_keeps_them(tmp_path: Path) -> None:
    """Its products run on a kernel that rounds activations too, so equality is to within their 8 bits."""
    model, inputs = CASES["quantized_already"]()
    onnx.save(model, tmp_path / "model.onnx")
    unharmed(tmp_path / "model.onnx", inputs, tmp_path / "out", tol=0.01)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    model, _ = CASES["sparse_initializer"]()
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="Sparse initializers are not read"):
        qc.compile(tmp_path / "model.onnx", tmp_path / "out", recipe="float")


def test_facts_that_others_wrote_are_not_taken_for_ours(tmp_path: Path) -> None:
    model, _ = CASES["odd_names_and_metadata"]()
    onnx.save(model, tmp_path / "model.onnx")
    result = qc.compile(tmp_path / "model.onnx", tmp_path / "out", recipe="float")
    assert result.artifact is not None
    assert "x" not in result.artifact.manifest.provenance


@pytest.mark.parametrize("name", ["sequence_input", "optional_input", "sequence_output", "odd_names_and_metadata"])
def test_an_artifact_runs_from_and_to_files(name: str, tmp_path: Path) -> None:
    model, inputs = CASES[name]()
    onnx.save(model, tmp_path / "model.onnx")
    compiled(tmp_path / "model.onnx", tmp_path / "out")
    flat: dict[str, object] = {}
    for key, value in inputs.items():
        flat |= {f"{key}[{i}]": v for i, v in enumerate(value)} if isinstance(value, Sequence) else {key: value}
    np.savez(tmp_path / "in.npz", **flat)  # type: ignore[arg-type]
    line = ["run", tmp_path / "out", "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz"]
    assert main([str(a) for a in line]) == 0
    names, expected = runtime(tmp_path / "model.onnx", inputs)
    with np.load(tmp_path / "out.npz") as found:
        for key, value in zip(names, expected, strict=True):
            items = {f"{key}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
            for item, array in items.items():
                np.testing.assert_allclose(found[item], array, atol=1e-4)


def test_an_input_that_is_no_sequence_is_refused(tmp_path: Path) -> None:
    model, _ = CASES["sequence_input"]()
    onnx.save(model, tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = qc.compile(tmp_path / "model.onnx", tmp_path / "out", recipe="float")
    assert result.artifact is not None
    with pytest.raises(InputError, match="sequence of float"):
        result.artifact.runner().run({})

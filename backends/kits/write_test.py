"""Kits are code in other languages: their parsers accept it, for models with odd names too."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import json
import re
from pathlib import Path

import onnx_ir as ir
import pytest

from qc.backends.kits.facts import facts_of
from qc.backends.kits.names import camel, constants, upper
from qc.backends.kits.write import write_kits
from qc.backends.target import backend_for
from qc.ir.model import Model, Port

TARGET = backend_for("ort-cpu").target


def _parsed(language: str, file: Path) -> str:
    """The names of the kinds of node in a file, once each, after a check that it has no error."""
    tree_sitter = pytest.importorskip("tree_sitter", reason="parsers come with the test extra")
    grammar = importlib.import_module(f"tree_sitter_{language}")
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    tree = parser.parse(file.read_bytes())
    wrong = [
        f"{file.name}:{n.start_point[0] + 1}: {n.text[:60]!r}"
        for n in _all(tree.root_node)
        if n.is_error or n.is_missing
    ]
    assert not wrong, wrong
    return str({n.type for n in _all(tree.root_node)})


def _all(node):
    yield node
    for child in node.children:
        yield from _all(child)


@pytest.fixture(params=["appending", "encoder", "odd"])
def model(request: pytest.FixtureRequest, build) -> Model:
    if request.param != "odd":
        return build(request.param)
    odd = build("encoder")
    odd.graph.inputs[0].name, odd.graph.outputs[0].name = '0 "in$put"/x', "class"
    odd.record(architecture='A "quoted" $name')
    return odd


@pytest.mark.parametrize(
    ("kit", "language", "suffixes", "header"),
    [
        ("android-ort", "kotlin", (".kt", ".kts"), ""),
        ("android-fixed", "kotlin", (".kt", ".kts"), ""),
        ("android-tvm", "kotlin", (".kt", ".kts"), "qc_run"),
        ("android-tvm", "kotlin", (".kt", ".kts"), "qc_feed"),
        ("ios-ort", "swift", (".swift",), ""),
        ("ios-fixed", "swift", (".swift",), ""),
        ("ios-tvm", "swift", (".swift",), "qc_run"),
        ("ios-tvm", "swift", (".swift",), "qc_feed"),
    ],
)
def test_parsers_accept_the_code_for_phones(model, kit, language, suffixes, header, tmp_path):
    (tmp_path / "model.h").write_text(header)
    (tmp_path / "model.json").write_text('{"march": "armv8-a"}')
    (tmp_path / "npu.json").write_text('{"unit": "qnn", "graphs": [{"file": "decode.onnx", "new": 1}]}')
    write_kits([kit], model, TARGET, tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.suffix in suffixes]
    assert len(files) > 4
    for file in files:
        assert "call" in _parsed(language, file)


def test_swift_calls_what_the_library_declares(build, tmp_path):
    (tmp_path / "model.h").write_text("qc_feed")
    write_kits(["ios-tvm"], build("appending"), TARGET, tmp_path)
    called = set(re.findall(r"\bqc_\w+", (tmp_path / "ios/Sources/QcModel/Model.swift").read_text()))
    headers = importlib.resources.files("qc.backends.tvm") / "host"
    declared = "".join((headers / name).read_text("utf-8") for name in ("model.h", "decoder.h"))
    assert {"qc_feed", "qc_sample", "qc_reset"} <= called
    assert called <= set(re.findall(r"\bqc_\w+", declared))


def test_the_parser_would_notice_a_mistake(build, tmp_path):
    write_kits(["android-ort"], build("encoder"), TARGET, tmp_path)
    file = tmp_path / "android/src/main/kotlin/qc/model/Interface.kt"
    file.write_text(file.read_text().replace("listOf(", "listOf((", 1))
    with pytest.raises(AssertionError, match=r"Interface\.kt"):
        _parsed("kotlin", file)


def test_names_and_shapes_of_the_model_are_in_the_code(build, tmp_path):
    write_kits(["android-ort", "ios-ort", "web"], build("appending"), TARGET, tmp_path)
    kotlin = (tmp_path / "android/src/main/kotlin/qc/model/Interface.kt").read_text()
    swift = (tmp_path / "ios/Sources/QcModel/Interface.swift").read_text()
    types = (tmp_path / "web/interface.d.mts").read_text()
    assert 'const val PAST_KEY_VALUES_0_KEY = "past_key_values.0.key"' in kotlin
    assert 'Port("past_key_values.0.key", "float", listOf(null, 2, null, 16), "past_key")' in kotlin
    assert 'public static let pastKeyValues0Key = "past_key_values.0.key"' in swift
    assert '"past_key_values.0.key": Tensor<Float32Array>;' in types
    facts = json.loads((tmp_path / "web/interface.mjs").read_text().partition("INTERFACE = ")[2].rstrip(";\n"))
    assert facts["caches"][0] == ["past_key_values.0.key", "present.0.key"]
    assert facts["limit"] == 48


@pytest.mark.parametrize(
    ("kind", "pooling", "task"),
    [
        ("appending", None, "generate"),
        ("plain", None, "generate"),
        ("encoder", "mean", "embed"),
        ("encoder", None, "embed"),
    ],
)
def test_the_task_is_read_from_the_roles(build, kind, pooling, task, tmp_path):
    model = build(kind)
    if pooling:
        model.record(pooling=pooling)
    assert facts_of(model, TARGET, tmp_path).task == task


@pytest.mark.parametrize(
    ("name", "kotlin", "swift"),
    [
        ("past_key_values.0.key", "PAST_KEY_VALUES_0_KEY", "pastKeyValues0Key"),
        ("class", "CLASS", "`class`"),
        ("0/out put", "_0_OUT_PUT", "_0OutPut"),
        ("/", "__", "_"),
    ],
)
def test_names_of_tensors_become_constants(name, kotlin, swift):
    assert (upper(name), camel(name)) == (kotlin, swift)


def test_names_that_are_spelled_alike_are_told_apart():
    ports = [Port(name, ir.DataType.FLOAT, ()) for name in ("a.b", "a_b", "a/b")]
    assert constants(ports, upper) == [("A_B", "a.b"), ("A_B2", "a_b"), ("A_B3", "a/b")]


def test_a_model_that_takes_arrays_is_run_as_it_is(build, tmp_path):
    model = build("encoder")
    signature = model.signature
    facts = facts_of(model, TARGET, tmp_path)
    assert (facts.tokenizer, facts.bos, facts.stop) == (False, None, ())
    other = dataclasses.replace(facts, signature=signature)
    assert other.to_json()["inputs"][0] == {
        "name": "input_ids",
        "dtype": "int64",
        "shape": ["batch", "seq"],
        "role": "tokens",
    }

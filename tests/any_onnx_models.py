"""Hand-made ONNX models of every odd kind: subgraphs, foreign operators, old spellings, types beyond tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Case = tuple[onnx.ModelProto, dict[str, object]]
"""A model and inputs that it takes."""


def _random(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def _model(text: str, weights: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """Parses a model; `weights` become initializers of the main graph."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in (weights or {}).items())
    return model


_HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
X4 = {"x": _random(3, 4)}


def if_with_outer_weights() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x, bool flag) => (float[n,8] y) {{
        c = Not(flag)
        y = If(c) <
            then_branch = a () => (float[n,8] t) {{ h = MatMul(x, w)  t = Add(h, b) }},
            else_branch = d () => (float[n,8] e) {{ h = MatMul(x, w)  e = Relu(h) }}
        >
    }}"""
    return _model(text, {"w": _random(4, 8), "b": _random(8)}), {**X4, "flag": np.array(True)}


def loop_with_state() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x) => (float[n,4] y, float[k,n,4] all) {{
        trips = Constant <value = int64 {{3}}> ()
        yes = Constant <value = bool {{1}}> ()
        y, all = Loop(trips, yes, x) <
            body = step (int64 i, bool c, float[n,4] s) => (bool c2, float[n,4] s2, float[n,4] out) {{
                c2 = Identity(c)
                h = MatMul(s, w)
                s2 = Tanh(h)
                out = Identity(s2)
            }}
        >
    }}"""
    return _model(text, {"w": _random(4, 4)}), X4


def nested_subgraphs() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x) => (float[n,4] y) {{
        trips = Constant <value = int64 {{4}}> ()
        yes = Constant <value = bool {{1}}> ()
        y = Loop(trips, yes, x) <
            body = step (int64 i, bool c, float[n,4] s) => (bool c2, float[n,4] s2) {{
                c2 = Identity(c)
                two = Constant <value = int64 {{2}}> ()
                late = GreaterOrEqual(i, two)
                s2 = If(late) <
                    then_branch = a () => (float[n,4] t) {{ h = MatMul(s, w)  t = Sigmoid(h) }},
                    else_branch = b () => (float[n,4] t) {{ h = MatMul(x, w)  u = Add(h, s)  t = Tanh(u) }}
                >
            }}
        >
    }}"""
    return _model(text, {"w": _random(4, 4)}), X4


def large_weights_inside_a_branch() -> Case:
    """Initializers of a subgraph, too large to stay within the graph file."""
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["t"])],
        "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(_random(64, 64), "inner")],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"])], "else", [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n", 64])],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "outer"], ["h"]),
            helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=other),
            helper.make_node("Add", ["h", "z"], ["y"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(_random(64, 64, seed=1), "outer")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, {"x": _random(3, 64), "flag": np.array(True)}


def scan() -> Case:
    text = f"""{_HEAD}
    g (float[5,4] x, float[4] s0) => (float[4] s, float[5,4] y) {{
        s, y = Scan <num_scan_inputs = 1, body = step (float[4] a, float[4] v) => (float[4] b, float[4] o) {{
            h = Add(a, v)  b = Tanh(h)  o = Identity(b)
        }}> (s0, x)
    }}"""
    return _model(text), {"x": _random(5, 4), "s0": _random(4)}


def contrib_operators() -> Case:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[n,64] x) => (float[n,64] y) {
        h = com.microsoft.FusedMatMul <alpha = 0.5> (x, w)
        a = com.microsoft.BiasGelu(h, b)
        y = com.microsoft.QuickGelu <alpha = 1.702> (a)
    }"""
    return _model(text, {"w": _random(64, 64), "b": _random(64)}), {"x": _random(3, 64)}


def local_functions() -> Case:
    text = """<ir_version: 8, opset_import: ["" : 17, "my.own" : 1]>
    g (float[n,64] x) => (float[n,64] y) {
        h = my.own.Block <scale = 0.5> (x, w)
        y = my.own.Twice(h)
    }
    <domain: "my.own", opset_import: ["" : 17, "my.own" : 1]>
    Block <scale: float> (x, w) => (y) {
        h = MatMul(x, w)
        s = Constant <value_float: float = @scale> ()
        t = Mul(h, s)
        y = my.own.Twice(t)
    }
    <domain: "my.own", opset_import: ["" : 17]>
    Twice (x) => (y) { y = Add(x, x) }"""
    return _model(text, {"w": _random(64, 64)}), {"x": _random(3, 64)}


def old_contrib_operator_in_the_default_domain() -> Case:
    text = """<ir_version: 6, opset_import: ["" : 9]>
    g (float[n,4] x) => (float[n,4] y) { y = ThresholdedRelu <alpha = 0.5> (x) }"""
    return _model(text), X4


def classical_model() -> Case:
    """An operator of ai.onnx.ml, as converters of scikit-learn write."""
    text = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    g (float[n,4] x) => (int64[n] label, float[n,3] scores) {
        label, scores = ai.onnx.ml.LinearClassifier <
            coefficients = [1.0, -1.0, 0.5, 0.0, 0.0, 1.0, 0.5, -0.5, 0.3, 0.2, 0.1, 0.7],
            intercepts = [0.0, 0.1, -0.2], classlabels_ints = [0, 1, 2], post_transform = "SOFTMAX"> (x)
    }"""
    return _model(text), X4


def sequence_output() -> Case:
    text = f"""{_HEAD}
    g (float[6,4] x) => (seq(float[a,4]) parts, float[6,4] y) {{
        parts = SplitToSequence <axis = 0> (x, sizes)
        y = Neg(x)
    }}"""
    return _model(text, {"sizes": np.array([1, 2, 3])}), {"x": _random(6, 4)}


def sequence_input() -> Case:
    text = f"""{_HEAD}
    g (seq(float[a,4]) parts) => (float[b,8] y) {{
        x = ConcatFromSequence <axis = 0> (parts)
        y = MatMul(x, w)
    }}"""
    return _model(text, {"w": _random(4, 8)}), {"parts": [_random(1, 4), _random(2, 4)]}


def optional_input() -> Case:
    text = f"""{_HEAD}
    g (optional(float[n,4]) maybe) => (float[n,4] y, bool there) {{
        there = OptionalHasElement(maybe)
        x = OptionalGetElement(maybe)
        y = Neg(x)
    }}"""
    return _model(text), {"maybe": _random(2, 4)}


def strings() -> Case:
    text = f"""{_HEAD}
    g (string[n] x) => (string[n] y) {{
        y = StringNormalizer <case_change_action = "NONE", is_case_sensitive = 1> (x)
    }}"""
    return _model(text), {"x": np.array(["one", "Two"], object)}


def no_inputs() -> Case:
    text = f"""{_HEAD}
    g () => (float[2,8] y) {{ y = MatMul(a, w) }}"""
    return _model(text, {"a": _random(2, 4), "w": _random(4, 8)}), {}


def constant_output() -> Case:
    """An output that is an initializer, and one that is an input."""
    text = f"""{_HEAD}
    g (float[n,4] x) => (float[4,8] w, float[n,4] same, float[n,8] y) {{ same = Identity(x)  y = MatMul(x, w) }}"""
    return _model(text, {"w": _random(4, 8)}), X4


def one_value_twice_as_output() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x) => (float[n,4] y, float[n,4] z, float[n,4] u) {{ y = Neg(x)  z = Neg(x)  u = Identity(y) }}"""
    return _model(text), X4


def zero_size() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x, float[0,4] nothing) => (float[m,4] y, float[0,8] z) {{
        y = Concat <axis = 0> (x, nothing)
        z = MatMul(nothing, w)
    }}"""
    return _model(text, {"w": _random(4, 8)}), {**X4, "nothing": np.zeros((0, 4), np.float32)}


def initializers_that_are_inputs() -> Case:
    """IR version 3, in which every initializer had to be an input too."""
    text = """<ir_version: 3, opset_import: ["" : 8]>
    g (float[n,64] x, float[64,64] w, float[64] b) => (float[n,64] y) {
        h = MatMul(x, w)  s = Add(h, b)  y = Relu(s)
    }"""
    return _model(text, {"w": _random(64, 64), "b": _random(64)}), {"x": _random(3, 64)}


def half_precision() -> Case:
    text = f"""{_HEAD}
    g (float16[n,64] x) => (float16[n,64] y) {{
        h = MatMul(x, w)
        s = Add(h, b)
        t = Softmax <axis = -1> (s)
        y = MatMul(t, v)
    }}"""
    weights = {"w": _random(64, 64, dtype=np.float16) / 8, "b": _random(64, dtype=np.float16)}
    weights["v"] = _random(64, 64, dtype=np.float16, seed=1) / 8
    return _model(text, weights), {"x": _random(3, 64, dtype=np.float16)}


def double_precision() -> Case:
    text = f"""{_HEAD}
    g (double[n,64] x) => (double[n,64] y) {{ h = MatMul(x, w)  y = Tanh(h) }}"""
    return _model(text, {"w": _random(64, 64, dtype=np.float64) / 8}), {"x": _random(3, 64, dtype=np.float64)}


def duplicate_node_names() -> Case:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="same"),
        helper.make_node("Relu", ["h"], ["r"], name="same"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="same"),
    ]
    graph = helper.make_graph(
        nodes, "",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(_random(64, 64), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, {"x": _random(3, 64)}


def equal_names_in_sibling_branches() -> Case:
    """Both branches name their values alike, with different shapes."""
    text = f"""{_HEAD}
    g (float[n,4] x, bool flag) => (float[a,b] y) {{
        y = If(flag) <
            then_branch = a () => (float[n,8] t) {{ h = MatMul(x, w)  t = Relu(h) }},
            else_branch = b () => (float[4,n] t) {{ h = Transpose <perm = [1, 0]> (x)  t = Relu(h) }}
        >
    }}"""
    return _model(text, {"w": _random(4, 8)}), {**X4, "flag": np.array(False)}


def odd_names_and_metadata() -> Case:
    text = f"""{_HEAD}
    g (float[n,64] x) => (float[n,64] y) {{ h = MatMul(x, w)  y = Relu(h) }}"""
    model = _model(text, {"w": _random(64, 64)})
    rename = {"x": "input:0", "y": "output/ä b:0", "w": "../w eight"}
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = rename.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [rename.get(n, n) for n in node.input]
        node.output[:] = [rename.get(n, n) for n in node.output]
    model.producer_name, model.domain, model.model_version, model.doc_string = "them", "some.where", 7, "About it."
    for key, value in (("author", "A. Person"), ("qc.x", "not ours"), ("empty", "")):
        model.metadata_props.add(key=key, value=value)
    model.graph.doc_string = "A graph."
    return model, {"input:0": _random(3, 64)}


def numbers_chosen_by_the_user() -> Case:
    """Runs on few inputs only: an integer input is a shape."""
    text = f"""{_HEAD}
    g (float[1,3,1] x, int64[3] shape) => (float[a,b,c] y) {{ y = Expand(x, shape) }}"""
    return _model(text), {"x": _random(1, 3, 1), "shape": np.array([2, 3, 4])}


def fixed_image_size_behind_symbols() -> Case:
    """The flattened size must fit a matrix, though the signature leaves height and width open."""
    text = f"""{_HEAD}
    g (float[n,3,h,w] x) => (float[n,10] y) {{
        c = Conv <kernel_shape = [3, 3], strides = [4, 4]> (x, k)
        r = Relu(c)
        f = Flatten(r)
        y = Gemm <transB = 1> (f, m, b)
    }}"""
    weights = {"k": _random(8, 3, 3, 3), "m": _random(10, 8 * 8 * 8), "b": _random(10)}
    return _model(text, weights), {"x": _random(2, 3, 32, 32)}


def runs_on_no_made_up_input() -> Case:
    """Its lookup accepts no index that anybody would guess."""
    text = f"""{_HEAD}
    g (int64[2] i, float[n,64] x) => (float[n,64] y) {{
        far = Constant <value = int64 {{1000}}> ()
        j = Sub(i, far)
        p = GatherElements(table, j)
        s = ReduceSum <keepdims = 0> (p)
        h = MatMul(x, w)
        y = Add(h, s)
    }}"""
    weights = {"table": _random(8), "w": _random(64, 64)}
    return _model(text, weights), {"i": np.array([1001, 1002]), "x": _random(3, 64)}


def random_numbers() -> Case:
    """Yields other numbers at each run; only the shape can be compared."""
    text = f"""{_HEAD}
    g (float[n,4] x) => (float[n,4] noise) {{ a = RandomNormalLike(x)  b = RandomNormalLike(x)  noise = Sub(a, b) }}"""
    return _model(text), X4


def dead_code_and_unused_weights() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x, float[n,4] unused) => (float[n,4] y) {{ dead = MatMul(x, w)  y = Neg(x) }}"""
    return _model(text, {"w": _random(4, 4), "never": _random(4)}), {**X4, "unused": _random(3, 4)}


def sparse_initializer() -> Case:
    text = f"""{_HEAD}
    g (float[n,4] x) => (float[n,4] y) {{ y = MatMul(x, w) }}"""
    model = _model(text)
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [2], [0, 5]), [4, 4])
    )
    return model, X4


def quantized_already() -> Case:
    text = f"""{_HEAD}
    g (float[n,64] x) => (float[n,64] y) {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear <axis = 1> (w, ws)
        y = MatMul(d, v)
    }}"""
    weights = {
        "s": np.array(0.02, np.float32), "z": np.array(3, np.uint8), "ws": np.abs(_random(64)) / 100,
        "w": np.random.default_rng(0).integers(-127, 128, (64, 64)).astype(np.int8),
    }  # fmt: skip
    return _model(text, weights), {"x": _random(3, 64)}


def newer_opset() -> Case:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[n,64] x) => (float[n,64] y) { h = MatMul(x, w)  y = Swish(h) }"""
    return _model(text, {"w": _random(64, 64)}), {"x": _random(3, 64)}


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        if_with_outer_weights, loop_with_state, nested_subgraphs, large_weights_inside_a_branch, scan,
        contrib_operators, local_functions, old_contrib_operator_in_the_default_domain, classical_model,
        sequence_output, sequence_input, optional_input, strings, no_inputs, constant_output,
        one_value_twice_as_output, zero_size, initializers_that_are_inputs, half_precision, double_precision,
        duplicate_node_names, equal_names_in_sibling_branches, odd_names_and_metadata, numbers_chosen_by_the_user,
        fixed_image_size_behind_symbols, runs_on_no_made_up_input, random_numbers, dead_code_and_unused_weights,
        sparse_initializer, quantized_already, newer_opset,
    )
}  # fmt: skip
"""Every model, by what is odd about it."""

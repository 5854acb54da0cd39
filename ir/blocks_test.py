from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir._blocks_repeat import Repeat, find_repeats
from qc.ir.blocks import Blocks, extract, find_blocks
from qc.ir.errors import InputError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse


class _Net:
    """Writes ONNX text line by line; every weight is random and seeded."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.weights: dict[str, np.ndarray] = {}
        self._rng = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = self._rng.standard_normal(shape).astype(np.float32) / 4
        return name

    def op(self, expression: str) -> str:
        self.lines.append(f"v{len(self.lines)} = {expression}")
        return f"v{len(self.lines) - 1}"

    def matmul(self, x: str, k: int, n: int) -> str:
        return self.op(f"MatMul ({x}, {self.weight(k, n)})")

    def norm(self, x: str, n: int) -> str:
        return self.op(f"LayerNormalization ({x}, {self.weight(n)})")

    def mlp(self, x: str, d: int, hidden: int) -> str:
        return self.matmul(self.op(f"Relu ({self.matmul(x, d, hidden)})"), hidden, d)

    def model(self, inputs: str, outputs: str) -> Model:
        return parse(f"g ({inputs}) => ({outputs}) {{ {chr(10).join(self.lines)} }}", weights=self.weights)


def _decoder(layers: int) -> Model:
    """Embedding, then pre-norm layers with a mask computed once and a cache, then norm and head."""
    net = _Net()
    net.lines.append("seq = Shape <start=1, end=2> (ids)")
    hidden = net.op("Cast <to=1> (mask)")
    x = net.op(f"Gather ({net.weight(16, 4)}, ids)")
    for i in range(layers):
        net.weights |= {"zero": np.array([0]), "one": np.array([1])}
        k = net.matmul(net.norm(x, 4), 4, 4)
        net.lines.append(f"new{i} = Concat <axis=1> (past{i}, {k})")
        mean = net.op(f"ReduceMean <keepdims=1, noop_with_empty_axes=1> (new{i})")
        mean = net.op(f"Slice ({mean}, zero, seq, one)")
        x = net.op(f"Add ({x}, {net.matmul(net.op(f'Mul ({mean}, {hidden})'), 4, 4)})")
        x = net.op(f"Add ({x}, {net.mlp(net.norm(x, 4), 4, 8)})")
    net.lines.append(f"logits = MatMul ({net.norm(x, 4)}, {net.weight(4, 16)})")
    cache = [(f"float[1,p,4] past{i}", f"float[1,t,4] new{i}") for i in range(layers)]
    return net.model(
        ", ".join(["int64[1,s] ids", "int64[1,s,1] mask", *(c[0] for c in cache)]),
        ", ".join(["float[1,s,16] logits", *(c[1] for c in cache)]),
    )


def _kinds(blocks: Blocks) -> list[str]:
    return [s.label for s in blocks.segments]


def _names(values: Iterable[ir.Value]) -> list[str | None]:
    return [v.name for v in values]


def _check_legal(model: ir.Model, blocks: Blocks) -> None:
    """Each node is in one segment, and in the order of the segments everything is computed before it is read."""
    nodes = [n for s in blocks.segments for n in s.nodes]
    assert len(nodes) == len(set(nodes)) == len(model.graph)
    done = {*model.graph.inputs, *model.graph.initializers.values()}
    for segment in blocks.segments:
        assert done.issuperset(segment.inputs)
        for node in segment.nodes:
            assert done.issuperset(v for v in node.inputs if v is not None)
            done.update(node.outputs)


def _run_by_segments(model: Model, blocks: Blocks, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values = dict(feeds)
    for segment in blocks.segments:
        if segment.outputs:
            values.update(Session(extract(model, segment)).run(values))
    return {v.name: values[v.name] for v in model.graph.outputs if v.name is not None}


def _check_same_result(model: Model, feeds: dict[str, np.ndarray]) -> None:
    expected = Session(model).run(feeds)
    found = _run_by_segments(model, find_blocks(model.graph), feeds)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_layers_of_a_decoder_are_blocks() -> None:
    model = _decoder(3)
    blocks = find_blocks(model.graph)
    assert _kinds(blocks) == ["preamble", "stem", "block 0.0", "block 0.1", "block 0.2", "tail"]
    assert [len(s.nodes) for s in blocks.runs[0]] == [13, 13, 13]
    _check_legal(model, blocks)


def test_a_block_gets_the_residual_stream_and_its_own_cache_and_shares_the_mask() -> None:
    model = _decoder(3)
    preamble, stem, first, second, *_ = find_blocks(model.graph).segments
    assert first.carried == stem.outputs
    assert second.carried == (first.outputs[-1],)
    assert _names(second.own) == ["past1"]
    assert second.shared == first.shared
    assert set(second.shared) == set(preamble.outputs)
    assert "new1" in _names(second.outputs)
    assert len(second.weights) == 8  # six of the layer, two bounds of the slice


def test_segments_run_one_after_another_give_the_whole_models_result() -> None:
    rng = np.random.default_rng(1)
    feeds = {"ids": np.array([[1, 5]]), "mask": np.ones((1, 2, 1), np.int64)}
    feeds |= {f"past{i}": rng.standard_normal((1, 3, 4)).astype(np.float32) for i in range(3)}
    _check_same_result(_decoder(3), feeds)


def test_names_do_not_matter() -> None:
    model = _decoder(3)
    expected = [len(s.nodes) for s in find_blocks(model.graph).segments]
    for i, node in enumerate(model.graph):
        node.name = f"n{i * 7919 % 101}_{i}"
        for output in node.outputs:
            output.name = f"t{i * 104729 % 997}_{i}"
    assert [len(s.nodes) for s in find_blocks(model.graph).segments] == expected


def test_norm_after_the_residual_ends_a_block_and_never_starts_one() -> None:
    net = _Net()
    x = net.norm(net.op(f"Gather ({net.weight(16, 4)}, ids)"), 4)
    for _ in range(3):
        x = net.norm(net.op(f"Add ({x}, {net.matmul(x, 4, 4)})"), 4)
        x = net.norm(net.op(f"Add ({x}, {net.mlp(x, 4, 8)})"), 4)
    net.lines.append(f"y = Identity ({x})")
    model = net.model("int64[1,s] ids", "float[1,s,4] y")
    blocks = find_blocks(model.graph)
    assert [[n.op_type for n in s.nodes][:1] for s in blocks.runs[0]] == [["MatMul"]] * 3
    assert [s.nodes[-1].op_type for s in blocks.runs[0]] == ["LayerNormalization"] * 3


def test_stages_of_different_width_are_separate_runs() -> None:
    net = _Net()
    x = net.matmul("x", 3, 4)
    for width, count in ((4, 2), (6, 3)):
        for _ in range(count):
            x = net.op(f"Add ({x}, {net.mlp(net.norm(x, width), width, 2 * width)})")
        x = net.matmul(x, width, 6)
    net.lines.append(f"y = Relu ({x})")
    blocks = find_blocks(net.model("float[1,3] x", "float[1,6] y").graph)
    assert [len(r) for r in blocks.runs] == [2, 3]
    assert [s.kind for s in blocks.segments if s.kind != "block"] == ["stem", "between", "tail"]


def _encoder_decoder() -> Model:
    net = _Net()

    def embed(ids: str) -> str:
        return net.op(f"Gather ({net.weight(16, 4)}, {ids})")

    x = embed("source")
    for _ in range(3):
        x = net.op(f"Add ({x}, {net.mlp(net.norm(x, 4), 4, 8)})")
    encoded = net.norm(x, 4)
    x = embed("target")
    for _ in range(2):
        x = net.op(f"Add ({x}, {net.matmul(net.norm(x, 4), 4, 4)})")
        keys = net.op(f"ReduceMean <keepdims=1> ({net.matmul(encoded, 4, 4)}, axes)")
        x = net.op(f"Add ({x}, {net.op(f'Mul ({net.matmul(net.norm(x, 4), 4, 4)}, {keys})')})")
        x = net.op(f"Add ({x}, {net.mlp(net.norm(x, 4), 4, 8)})")
    net.lines.append(f"logits = MatMul ({net.norm(x, 4)}, {net.weight(4, 16)})")
    net.weights["axes"] = np.array([1])
    return net.model("int64[1,s] source, int64[1,t] target", "float[1,t,16] logits")


def test_encoder_and_decoder_are_two_runs_and_the_encoders_output_is_shared() -> None:
    model = _encoder_decoder()
    blocks = find_blocks(model.graph)
    assert [len(r) for r in blocks.runs] == [3, 2]
    _check_legal(model, blocks)
    first, second = blocks.runs[1]
    assert first.shared == second.shared
    assert len(first.shared) == len(first.carried) == 1
    _check_same_result(model, {"source": np.array([[3, 1, 4]]), "target": np.array([[1, 5]])})


def test_towers_that_meet_at_the_end_are_two_runs() -> None:
    net = _Net()
    ends = []
    for source, layers, width in (("a", 2, 4), ("b", 3, 6)):
        x = net.matmul(source, 3, width)
        for _ in range(layers):
            x = net.op(f"Add ({x}, {net.mlp(net.norm(x, width), width, 8)})")
        ends.append(net.matmul(x, width, 4))
    net.lines.append(f"y = Mul ({ends[0]}, {ends[1]})")
    model = net.model("float[1,3] a, float[1,3] b", "float[1,4] y")
    blocks = find_blocks(model.graph)
    assert sorted(len(r) for r in blocks.runs) == [2, 3]
    _check_legal(model, blocks)
    _check_same_result(model, {"a": np.ones((1, 3), np.float32), "b": np.ones((1, 3), np.float32)})


def test_alternating_layers_form_blocks_of_two() -> None:
    net = _Net()
    x = net.matmul("x", 3, 4)
    for i in range(6):
        branch = net.mlp(net.norm(x, 4), 4, 8)
        x = net.op(f"Add ({x}, {net.op(f'Tanh ({branch})') if i % 2 else branch})")
    net.lines.append(f"y = Relu ({x})")
    blocks = find_blocks(net.model("float[1,3] x", "float[1,4] y").graph)
    assert [[n.op_type for n in s.nodes].count("Tanh") for s in blocks.runs[0]] == [1, 1, 1]


def test_plain_chain_of_convolutions_repeats_from_its_weight() -> None:
    net = _Net()
    x = net.op(f"Relu ({net.op(f'Conv <pads=[1,1,1,1]> (x, {net.weight(4, 3, 3, 3)})')})")
    for _ in range(3):
        x = net.op(f"Relu ({net.op(f'Conv <pads=[1,1,1,1]> ({x}, {net.weight(4, 4, 3, 3)})')})")
    net.lines.append(f"y = GlobalAveragePool ({x})")
    blocks = find_blocks(net.model("float[1,3,8,8] x", "float[1,4,1,1] y").graph)
    assert [[n.op_type for n in s.nodes] for s in blocks.runs[0]] == [["Conv", "Relu"]] * 3


@pytest.mark.parametrize("every", [1, 2])
def test_format_of_weights_and_activations_does_not_matter(every: int) -> None:
    model = _decoder(4)
    expected = [len(r) for r in find_blocks(model.graph).runs]
    graph = model.graph
    for i, node in enumerate([n for n in graph if n.op_type == "MatMul"]):
        if i % every == 0:
            _quantize_weight(graph, node)
        if i % (2 * every) == 0:
            _quantize_input(graph, node)
    blocks = find_blocks(graph)
    assert [len(r) for r in blocks.runs] == expected
    _check_legal(model, blocks)


def _quantize_weight(graph: ir.Graph, node: ir.Node) -> None:
    weight = node.inputs[1]
    assert weight is not None
    codes = ir.Value(name=f"{weight.name}_codes", const_value=ir.tensor(np.zeros(weight.shape.numpy(), np.int8)))
    scale = ir.Value(name=f"{weight.name}_scale", const_value=ir.tensor(np.float32(0.1)))
    for value in (codes, scale):
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
        graph.register_initializer(value)
    decode = ir.node("DequantizeLinear", [codes, scale])
    graph.insert_before(node, decode)
    node.replace_input_with(1, decode.outputs[0])


def _quantize_input(graph: ir.Graph, node: ir.Node) -> None:
    scale = ir.Value(name=f"{node.outputs[0].name}_input_scale", const_value=ir.tensor(np.float32(0.1)))
    scale.dtype, scale.shape = ir.DataType.FLOAT, ir.Shape([])
    graph.register_initializer(scale)
    codes = ir.node("QuantizeLinear", [node.inputs[0], scale], {"output_dtype": ir.DataType.INT8})
    back = ir.node("DequantizeLinear", [codes.outputs[0], scale])
    graph.insert_before(node, [codes, back])
    node.replace_input_with(0, back.outputs[0])


def test_layers_of_the_dialect_are_blocks_and_their_functions_come_along() -> None:
    net = _Net()
    x = net.op(f"qc.Linear (x, {net.weight(4, 3)})")
    for _ in range(3):
        gate = net.op(f"qc.Swish <alpha: float = 1.0> ({net.op(f'qc.Linear ({x}, {net.weight(8, 4)})')})")
        x = net.op(f"Add ({x}, {net.op(f'qc.Linear:bias ({gate}, {net.weight(4, 8)}, {net.weight(4)})')})")
    net.lines.append(f"y = Relu ({x})")
    model = net.model("float[1,3] x", "float[1,4] y")
    assert _kinds(find_blocks(model.graph)) == ["stem", "block 0.0", "block 0.1", "block 0.2", "tail"]
    _check_same_result(model, {"x": np.ones((1, 3), np.float32)})


def test_a_value_that_a_subgraph_captures_is_an_input() -> None:
    net = _Net()
    x = net.matmul("x", 3, 4)
    for i in range(2):
        h = net.matmul(x, 4, 4)
        body = f"b{i}_{{}} () => (float[1,4] o{i}_{{}}) {{{{ o{i}_{{}} = {{}} ({h}) }}}}"
        then, other = (body.format(k, k, k, op) for k, op in (("t", "Relu"), ("e", "Tanh")))
        x = net.op(f"Add ({x}, {net.op(f'If <then_branch: graph = {then}, else_branch: graph = {other}> (flag)')})")
    net.lines.append(f"y = Relu ({x})")
    model = net.model("float[1,3] x, bool flag", "float[1,4] y")
    blocks = find_blocks(model.graph)
    assert [len(r) for r in blocks.runs] == [2]
    _check_same_result(model, {"x": np.ones((1, 3), np.float32), "flag": np.array(True)})


def test_a_constant_of_an_earlier_segment_comes_along_and_is_no_input() -> None:
    net = _Net()
    x = net.matmul("x", 3, 4)
    net.lines.append("half = Constant <value_float: float = 0.5> ()")
    for _ in range(3):
        x = net.op(f"Add ({x}, {net.op(f'Mul ({net.matmul(x, 4, 4)}, half)')})")
    net.lines.append(f"y = Relu ({x})")
    model = net.model("float[1,3] x", "float[1,4] y")
    blocks = find_blocks(model.graph)
    assert [_names(s.constants) for s in blocks.runs[0]] == [["half"]] * 3
    assert [len(s.inputs) for s in blocks.runs[0]] == [1, 1, 1]
    _check_same_result(model, {"x": np.ones((1, 3), np.float32)})


def test_a_decoded_weight_of_two_segments_is_made_once_before_them() -> None:
    net = _Net()
    net.lines.append(f"table = Cast <to=1> ({net.weight(16, 4)})")
    x = net.op("Gather (table, ids)")
    for _ in range(2):
        x = net.op(f"Add ({x}, {net.mlp(x, 4, 8)})")
    net.lines.append(f"y = MatMul ({x}, {net.op('Transpose <perm=[1,0]> (table)')})")
    model = net.model("int64[1,s] ids", "float[1,s,16] y")
    blocks = find_blocks(model.graph)
    assert _names(blocks.segments[-1].shared) == ["table"]
    _check_legal(model, blocks)
    _check_same_result(model, {"ids": np.array([[3, 1]])})


def test_blocks_that_carry_two_values_are_found() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23, "fused": 1}, name="g")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(x)

    def add(op: str, inputs: Sequence[ir.Value], outputs: int = 1) -> Sequence[ir.Value]:
        weight = ir.Value(name=f"w{len(graph)}", const_value=ir.tensor(np.ones((4, 4), np.float32)))
        graph.register_initializer(weight)
        graph.append(ir.node(op, [*inputs, weight], num_outputs=outputs, domain="fused"))
        return graph[-1].outputs

    normed, residual = add("SkipNorm", [x], 2)
    for _ in range(3):
        (branch,) = add("Linear", [normed])
        normed, residual = add("SkipNorm", [branch, residual], 2)
    graph.outputs.extend(add("Head", [normed]))
    assert [len(s.carried) for s in find_blocks(graph).runs[0]] == [2, 2, 2]


@pytest.mark.parametrize("layers", [0, 1])
def test_without_repetition_everything_is_stem(layers: int) -> None:
    model = _decoder(layers)
    blocks = find_blocks(model.graph)
    assert _kinds(blocks) == ["stem"]
    assert blocks.runs == ()
    _check_legal(model, blocks)


def test_repeats_without_weights_are_no_blocks() -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Relu (x) b = Relu (a) c = Relu (b) y = Relu (c) }")
    assert _kinds(find_blocks(model.graph)) == ["stem"]


def test_a_graph_without_nodes_has_no_segments() -> None:
    assert find_blocks(ir.Graph([], [], nodes=[], name="g")).segments == ()


def test_segment_of_finds_the_segment_of_a_node() -> None:
    model = _decoder(2)
    blocks = find_blocks(model.graph)
    assert blocks.segment_of(model.graph.node(-1)).kind == "tail"


def test_extract_of_an_untyped_boundary_says_what_to_do() -> None:
    model = _decoder(2)
    block = find_blocks(model.graph).runs[0][0]
    block.carried[0].type = None
    with pytest.raises(InputError, match="shape inference"):
        extract(model, block)


def test_extract_leaves_the_model_alone() -> None:
    model = _decoder(2)
    before = [(n, tuple(n.inputs)) for n in model.graph]
    part = extract(model, find_blocks(model.graph).runs[0][0])
    assert [(n, tuple(n.inputs)) for n in model.graph] == before
    assert not set(part.graph) & set(model.graph)


@pytest.mark.parametrize("seed", range(20))
def test_any_graph_is_divided_legally(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [ir.Value(name=f"in{i}", type=ir.TensorType(ir.DataType.FLOAT)) for i in range(2)]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 23}, name="g")
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((4, 4), np.float32)))
    graph.register_initializer(weight)
    values = list(values)
    for _ in range(120):
        near = values[-int(rng.integers(1, 6)) :]
        inputs = [near[int(rng.integers(len(near)))] for _ in range(int(rng.integers(0, 3)))]
        graph.append(ir.node(str(rng.choice(["A", "Shape", "Cast"])), inputs + [weight] * int(rng.integers(2))))
        values.append(graph[-1].outputs[0])
    graph.outputs.extend(values[-3:])
    model = ir.Model(graph, ir_version=10)
    _check_legal(model, find_blocks(graph))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("abababx", [Repeat(0, 2, 3)]),
        ("xaaaay", [Repeat(1, 1, 4)]),
        ("abcabcdede", [Repeat(0, 3, 2), Repeat(6, 2, 2)]),
        ("aabaab", [Repeat(0, 3, 2)]),
        ("abc", []),
        ("", []),
    ],
)
def test_repeats_are_those_that_cover_most(items: str, expected: list[Repeat]) -> None:
    assert find_repeats([ord(c) for c in items], [1] * len(items)) == expected

"""Tests of the torch executor on graphs built by hand. Its operators have tests/test_node_conformance.py."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.execute import Executor, supported_ops

torch = pytest.importorskip("torch", reason="the torch executor needs torch")

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
DIM, HEADS, VOCAB, LENGTH = 16, 2, 12, 5


def value(name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def weight(name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(array if dtype is None else array.astype(dtype.numpy()), dtype=dtype, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def graph_of(
    inputs: Sequence[ir.Value], nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], opset: int = 23
) -> ir.Graph:
    """A graph of nodes in order; values without a producer that are no inputs become its initializers."""
    used = dict.fromkeys(v for n in nodes for v in n.inputs if v is not None)
    constants = [v for v in used if v.const_value is not None and v not in inputs]
    return ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": opset}, name="g")


def chain(*nodes: ir.Node) -> list[ir.Node]:
    for i, node in enumerate(nodes):
        for j, out in enumerate(node.outputs):
            out.name = f"v{i}.{j}"
    return list(nodes)


class Decoder:
    """One canonical decoder block with its embedding and head, small and random."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)

        def make(name: str, *shape: int) -> ir.Value:
            return weight(name, (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32))

        self.ids = value("ids", ["batch", "seq"], INT64)
        self.positions = value("positions", ["batch", "seq"], INT64)
        angles = np.outer(np.arange(LENGTH), 1 / 100 ** (np.arange(DIM // HEADS // 2) / 4)).astype(np.float32)
        cos, sin = weight("cos", np.cos(angles)), weight("sin", np.sin(angles))
        self.embedding = make("embedding", VOCAB, DIM)
        self.weights = [make(n, DIM, DIM) for n in ("q", "k", "v", "o", "gate", "up", "down")]
        self.gains = [weight(n, (1 + 0.1 * rng.standard_normal(DIM)).astype(np.float32)) for n in ("norm1", "norm2")]
        q, k, v, o, gate, up, down = self.weights
        one, two = self.gains

        embed = ir.node("Gather", [self.embedding, self.ids])
        norm1 = ir.node("RMSNormalization", [embed.outputs[0], one])
        queries, keys, values = (dialect.linear(norm1.outputs[0], w) for w in (q, k, v))
        turned = [
            ir.node("RotaryEmbedding", [x.outputs[0], cos, sin, self.positions], {"num_heads": HEADS})
            for x in (queries, keys)
        ]
        attention = ir.node(
            "Attention", [turned[0].outputs[0], turned[1].outputs[0], values.outputs[0]],
            {"q_num_heads": HEADS, "kv_num_heads": HEADS, "is_causal": 1},
        )  # fmt: skip
        projected = dialect.linear(attention.outputs[0], o)
        add1 = ir.node("Add", [embed.outputs[0], projected.outputs[0]])
        norm2 = ir.node("RMSNormalization", [add1.outputs[0], two])
        gated, lifted = (dialect.linear(norm2.outputs[0], w) for w in (gate, up))
        act = dialect.swish(gated.outputs[0])
        product = ir.node("Mul", [act.outputs[0], lifted.outputs[0]])
        lowered = dialect.linear(product.outputs[0], down)
        add2 = ir.node("Add", [add1.outputs[0], lowered.outputs[0]])
        head = dialect.linear(add2.outputs[0], self.embedding)
        nodes = chain(
            embed, norm1, queries, keys, values, *turned, attention, projected, add1, norm2, gated, lifted, act,
            product, lowered, add2, head,
        )  # fmt: skip
        for node in nodes:
            node.outputs[0].dtype = FLOAT
        self.start, self.middle, self.end = embed.outputs[0], add1.outputs[0], add2.outputs[0]
        self.logits = head.outputs[0]
        graph = graph_of([self.ids, self.positions], nodes, [self.logits])
        graph.opset_imports[dialect.DOMAIN] = dialect.VERSION
        self.model = ir.Model(graph, ir_version=11)
        dialect.sync_functions(self.model)

    def feeds(self) -> dict[str, np.ndarray]:
        ids = np.array([[1, 5, 2, 7, 3], [4, 4, 0, 11, 9]])
        return {"ids": ids, "positions": np.tile(np.arange(LENGTH), (2, 1))}


def test_a_decoder_agrees_with_onnx_runtime() -> None:
    ort = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
    decoder = Decoder()
    session = ort.InferenceSession(ir.serde.serialize_model(decoder.model).SerializeToString())
    (expected,) = session.run(None, decoder.feeds())
    (found,) = Executor(decoder.model)(decoder.feeds()).values()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_of_a_decoder() -> None:
    decoder = Decoder()
    executor = Executor(decoder.model)
    trained = [decoder.embedding, *decoder.weights, *decoder.gains]
    executor.parameters = {v: executor.read(v).clone().requires_grad_() for v in trained}
    (logits,) = executor(decoder.feeds()).values()
    logits.logsumexp(-1).sum().backward()
    for v, parameter in executor.parameters.items():
        assert parameter.grad is not None, v.name
        assert torch.isfinite(parameter.grad).all(), v.name
        assert parameter.grad.abs().sum() > 0, v.name


def test_gradients_are_those_of_finite_differences() -> None:
    decoder = Decoder()
    executor = Executor(decoder.model, dtype=torch.float64)
    start = executor.read(decoder.weights[0]).clone().requires_grad_()

    def loss(parameter: Any) -> Any:
        executor.parameters = {decoder.weights[0]: parameter}
        (logits,) = executor(decoder.feeds()).values()
        return logits.logsumexp(-1).sum()

    assert torch.autograd.gradcheck(loss, (start,), fast_mode=True)


def test_a_block_computes_what_the_whole_run_computes_there() -> None:
    decoder = Decoder()
    whole = Executor(decoder.model, outputs=[decoder.start, decoder.middle, decoder.end])(decoder.feeds())
    names = [v.name for v in (decoder.start, decoder.middle, decoder.end)]
    first = Executor.block(decoder.model, [decoder.start, decoder.positions], [decoder.middle])
    second = Executor.block(decoder.model, [decoder.middle], [decoder.end])
    middle = first({names[0]: whole[names[0]], "positions": decoder.feeds()["positions"]})[names[1]]
    end = second({names[1]: middle})[names[2]]
    assert torch.equal(middle, whole[names[1]])
    assert torch.equal(end, whole[names[2]])


def test_a_block_that_is_not_closed_names_the_value_it_lacks() -> None:
    decoder = Decoder()
    with pytest.raises(InputError, match="positions"):
        Executor.block(decoder.model, [decoder.start], [decoder.end])


def test_a_weight_outside_the_block_is_not_read() -> None:
    decoder = Decoder()

    def read() -> Any:
        raise AssertionError("read")

    decoder.embedding.const_value = ir.LazyTensor(read, dtype=FLOAT, shape=ir.Shape([VOCAB, DIM]), name="embedding")
    block = Executor.block(decoder.model, [decoder.middle], [decoder.end])
    block({str(decoder.middle.name): torch.ones(1, 2, DIM)})


def test_a_weight_is_let_go_after_its_last_use() -> None:
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def lazily(index: int) -> ir.LazyTensor:
        def read() -> ir.Tensor:
            counts.append(sum(r() is not None for r in alive))
            array = np.full((4, 4), index, np.float32)
            alive.append(weakref.ref(array))
            return ir.Tensor(array)

        return ir.LazyTensor(read, dtype=FLOAT, shape=ir.Shape([4, 4]), name=f"w{index}")

    x = value("x", [1, 4])
    nodes, last = [], x
    for i in range(6):
        w = ir.Value(name=f"w{i}", shape=ir.Shape([4, 4]), type=ir.TensorType(FLOAT), const_value=lazily(i))
        nodes.append(ir.node("MatMul", [last, w]))
        last = nodes[-1].outputs[0]
    executor = Executor(graph_of([x], chain(*nodes), [last]))
    with torch.no_grad():
        executor({"x": np.ones((1, 4), np.float32)})
    assert counts == [0] * 6
    assert executor.peak == 3  # an activation, a weight and their product


def test_float64_computes_float_graphs_in_double() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal((64, 3)).astype(np.float32)
    x = value("x", [3, 64])
    narrow = ir.node("Cast", [x], {"to": ir.DataType.FLOAT16})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": FLOAT})
    product = ir.node("MatMul", [wide.outputs[0], weight("w", b)])
    graph = graph_of([x], chain(narrow, wide, product), [product.outputs[0]])
    (found,) = Executor(graph, dtype=torch.float64)({"x": a}).values()
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), a.astype(np.float64) @ b.astype(np.float64), rtol=1e-13)


def test_a_computed_value_can_be_replaced_and_then_nothing_is_computed_for_it() -> None:
    x = value("x", [2, 4])
    codes = weight("codes", np.arange(-8, 8).reshape(4, 4), ir.DataType.INT4)
    decode = ir.node("DequantizeLinear", [codes, weight("scale", np.full(4, 0.5, np.float32))], {"axis": 1})
    product = ir.node("MatMul", [x, decode.outputs[0]])
    executor = Executor(graph_of([x], chain(decode, product), [product.outputs[0]]))
    given = np.ones((2, 4), np.float32)
    (found,) = executor({"x": given}).values()
    np.testing.assert_array_equal(found.numpy(), given @ (np.arange(-8, 8).reshape(4, 4) * 0.5).astype(np.float32))
    trained = torch.zeros(4, 4, requires_grad=True)
    executor.parameters[decode.outputs[0]] = trained
    (found,) = executor({"x": given}).values()
    found.sum().backward()
    assert trained.grad is not None
    assert torch.equal(trained.grad, torch.full((4, 4), 2.0))
    del executor.parameters[decode.outputs[0]]
    assert next(iter(executor({"x": given}).values())).abs().sum() > 0


def fake_quantized() -> ir.Graph:
    x, scale = value("x", [5]), weight("scale", np.array(0.5, np.float32))
    zero = weight("zero", np.array(0), ir.DataType.INT4)
    quantize = ir.node("QuantizeLinear", [x, scale, zero])
    decode = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    return graph_of([x], chain(quantize, decode), [decode.outputs[0]])


def test_straight_through_rounding_passes_gradients_inside_the_range_only() -> None:
    x = torch.tensor([0.2, -0.9, 1.4, 3.9, -9.0], requires_grad=True)
    (rounded,) = Executor(fake_quantized(), straight_through=True)({"x": x}).values()
    (plain,) = Executor(fake_quantized())({"x": x.detach()}).values()
    torch.testing.assert_close(rounded.detach(), plain)
    assert plain.tolist() == [0.0, -1.0, 1.5, 3.5, -4.0]
    rounded.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0]


def test_straight_through_dynamic_quantization_passes_gradients_through_an_integer_product() -> None:
    rng = np.random.default_rng(0)
    x = value("x", [3, 8])
    w = weight("w", rng.integers(-127, 128, (8, 4)).astype(np.int8))
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    codes, scale, zero = quantize.outputs
    product = ir.node("MatMulInteger", [codes, w, zero])
    cast = ir.node("Cast", [product.outputs[0]], {"to": FLOAT})
    scaled = ir.node("Mul", [cast.outputs[0], scale])
    graph = graph_of([x], chain(quantize, product, cast, scaled), [scaled.outputs[0]])
    given = torch.tensor(rng.standard_normal((3, 8)), dtype=torch.float32, requires_grad=True)
    (plain,) = Executor(graph)({"x": given.detach()}).values()
    (found,) = Executor(graph, straight_through=True)({"x": given}).values()
    torch.testing.assert_close(found.detach(), plain)
    found.sum().backward()
    assert given.grad is not None
    assert w.const_value is not None
    expected = torch.tensor(w.const_value.numpy().astype(np.float32).sum(1)).expand(3, 8)
    inner = (given.detach() != given.detach().max()) & (given.detach() != given.detach().min())
    torch.testing.assert_close(given.grad[inner], expected[inner], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_grids_agree_with_their_body_and_pass_gradients(token: bool, symmetric: bool, bits: int) -> None:
    from qc.ir.runtime import Session

    x = value("x", [3, 8])
    node = dialect.dynamic_quantize(x, bits=bits, token=token, symmetric=symmetric)
    graph = graph_of([x], chain(node), [node.outputs[0]])
    model = ir.Model(graph, ir_version=10)
    dialect.sync_functions(model)
    given = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    given[1] = 0
    wanted = next(iter(Session(model).run({"x": given}).values()))
    trained = torch.tensor(given, requires_grad=True)
    for straight_through in (False, True):
        (found,) = Executor(graph, straight_through=straight_through)({"x": trained}).values()
        np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-6)
    found.sum().backward()
    assert trained.grad is not None
    ends = np.isin(given, [given.max(1), given.min(1)]) if token else np.isin(given, [given.max(), given.min()])
    np.testing.assert_allclose(trained.grad.numpy()[~ends & (given != 0)], 1, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_products_and_lookups_agree_with_onnx_runtime(bits: int, symmetric: bool) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
    rng = np.random.default_rng(bits)
    rows, depth, block = 16, 64, 32
    packed = rng.integers(0, 256, (rows, depth // block, block * bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (rows, depth // block)).astype(np.float32)
    zeros = rng.integers(0, 256, (rows, -(-depth // block * bits // 8))).astype(np.uint8)
    x, ids = value("x", ["n", depth]), value("ids", [2, 3], INT64)
    z = [] if symmetric else [weight("z", zeros)]
    product = ir.node(
        "MatMulNBits", [x, weight("b", packed), weight("s", scales), *z],
        {"bits": bits, "block_size": block, "K": depth, "N": rows}, domain="com.microsoft",
    )  # fmt: skip
    flat = weight("table", packed.reshape(rows, -1))
    lookup = ir.node(
        "GatherBlockQuantized", [flat, ids, product.inputs[2], *z],
        {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}, domain="com.microsoft",
    )  # fmt: skip
    nodes = chain(product, lookup)
    for node, shape in zip(nodes, (["n", rows], [2, 3, depth]), strict=True):
        node.outputs[0].dtype, node.outputs[0].shape = FLOAT, ir.Shape(shape)
    graph = graph_of([x, ids], nodes, [n.outputs[0] for n in nodes])
    graph.opset_imports["com.microsoft"] = 1
    model = ir.Model(graph, ir_version=10)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    feeds = {"x": rng.standard_normal((3, depth)).astype(np.float32), "ids": rng.integers(0, rows, (2, 3))}
    for expected, found in zip(session.run(None, feeds), Executor(model)(feeds).values(), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [ir.DataType.INT2, ir.DataType.UINT4, ir.DataType.FLOAT8E4M3FN])
def test_blocked_decoding_of_narrow_types_multiplies_each_block_by_its_scale(dtype: ir.DataType) -> None:
    array = np.array([[0, 1, -2, 1], [-1, 0, 1, -2]]) if dtype.is_signed() else np.array([[0, 1, 15, 7], [2, 3, 9, 8]])
    codes = weight("codes", array, dtype)
    scales = np.array([[0.5, 2.0], [4.0, 0.25]], np.float32)
    decode = ir.node("DequantizeLinear", [codes, weight("s", scales)], {"axis": 1, "block_size": 2})
    (found,) = Executor(graph_of([], chain(decode), [decode.outputs[0]], opset=25))({}).values()
    np.testing.assert_array_equal(found.numpy(), array * np.repeat(scales, 2, 1))


def test_a_subgraph_reads_values_of_the_graph_around_it() -> None:
    x, flag = value("x", [2]), value("flag", [], ir.DataType.BOOL)
    double = ir.node("Add", [x, x])
    one = weight("one", np.ones(2, np.float32))
    yes, no = ir.node("Mul", [double.outputs[0], double.outputs[0]]), ir.node("Sub", [x, one])
    branches = [
        ir.Graph([], [n.outputs[0]], nodes=[n], initializers=c, name=f"b{i}")
        for i, (n, c) in enumerate([(yes, []), (no, [one])])
    ]
    choose = ir.node("If", [flag], {"then_branch": branches[0], "else_branch": branches[1]})
    executor = Executor(graph_of([x, flag], chain(double, choose), [choose.outputs[0]]))
    array = np.array([1.0, 2.0], np.float32)
    for choice, expected in ((True, [4.0, 16.0]), (False, [0.0, 1.0])):
        (found,) = executor({"x": array, "flag": np.array(choice)}).values()
        assert found.tolist() == expected


def test_a_function_without_an_operator_runs_by_its_body_with_the_attributes_of_the_call() -> None:
    a = ir.Value(name="a")
    leaky = ir.Node("", "LeakyRelu", [a], [ir.RefAttr("alpha", "slope", ir.AttributeType.FLOAT)])
    body = ir.Graph([a], leaky.outputs, nodes=[leaky], opset_imports={"": 23}, name="body")
    function = ir.Function("mine", "Bend", "", graph=body, attributes=[ir.AttrFloat32("slope", 0.5)])
    x = value("x", [2])
    plain, steep = ir.node("Bend", [x], domain="mine"), ir.node("Bend", [x], {"slope": 2.0}, domain="mine")
    nodes = chain(plain, steep)
    graph = graph_of([x], nodes, [n.outputs[0] for n in nodes])
    model = ir.Model(graph, ir_version=10, functions=[function])
    found = Executor(model)({"x": np.array([-1.0, 1.0], np.float32)})
    assert [t.tolist() for t in found.values()] == [[-0.5, 1.0], [-2.0, 1.0]]


def test_softmax_means_what_its_opset_says() -> None:
    array = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    sums = {}
    for opset in (11, 13):
        x = value("x", [2, 2, 3])
        node = ir.node("Softmax", [x])
        graph = graph_of([x], chain(node), [node.outputs[0]], opset)
        (found,) = Executor(graph)({"x": array}).values()
        sums[opset] = found.sum().item()
    assert sums[11] == pytest.approx(2)  # one distribution per first index
    assert sums[13] == pytest.approx(4)  # one per row


def test_an_unknown_operator_is_named_before_anything_runs() -> None:
    x = value("x", [2])
    node = ir.node("Frobnicate", [x], domain="elsewhere", name="odd")
    graph = graph_of([x], chain(node), [node.outputs[0]])
    with pytest.raises(UnsupportedError, match=r"Frobnicate of domain 'elsewhere' .*'odd'.*supported_ops"):
        Executor(graph)
    assert {"Attention", "Add", "qc::Linear", "com.microsoft::MatMulNBits"} <= set(supported_ops())


def test_wrong_inputs_are_told_apart() -> None:
    decoder = Decoder()
    executor = Executor(decoder.model)
    with pytest.raises(InputError, match="depend on inputs"):
        executor({"ids": decoder.feeds()["ids"]})
    with pytest.raises(InputError, match="no inputs"):
        executor({**decoder.feeds(), "mask": np.ones(3)})
    with pytest.raises(InputError, match="expects INT64"):
        executor({**decoder.feeds(), "ids": np.ones((2, LENGTH), np.float32)})
    with pytest.raises(InputError, match=r"Gather.*cannot run"):
        executor({**decoder.feeds(), "ids": np.full((2, LENGTH), VOCAB)})


def test_on_another_device_tensors_meet_there_and_shapes_stay_on_the_host() -> None:
    x = value("x", ["n", 4])
    shape = ir.node("Shape", [x])
    first = ir.node("Gather", [shape.outputs[0], weight("zero", np.array([0]))])
    count = ir.node("Squeeze", [first.outputs[0]])
    rows = ir.node("Range", [weight("start", np.array(0)), count.outputs[0], weight("step", np.array(1))])
    wide = ir.node("Cast", [rows.outputs[0]], {"to": FLOAT})
    column = ir.node("Reshape", [wide.outputs[0], weight("column", np.array([-1, 1]))])
    square = ir.node("Pow", [column.outputs[0], weight("two", np.array(2, np.float32))])
    total = ir.node("Add", [x, square.outputs[0]])
    nodes = chain(shape, first, count, rows, wide, column, square, total)
    graph = graph_of([x], nodes, [first.outputs[0], total.outputs[0]])
    size, found = Executor(graph, device="meta")({"x": np.ones((3, 4), np.float32)}).values()
    assert size.tolist() == [3]  # a tensor on the meta device has no values to list
    assert (found.device.type, tuple(found.shape)) == ("meta", (3, 4))
    (logits,) = Executor(Decoder().model, device="meta")(Decoder().feeds()).values()
    assert tuple(logits.shape) == (2, LENGTH, VOCAB)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_decoder_on_cuda_agrees_with_the_cpu() -> None:
    decoder = Decoder()
    (expected,) = Executor(decoder.model, dtype=torch.float64)(decoder.feeds()).values()
    (found,) = Executor(decoder.model, dtype=torch.float64, device="cuda")(decoder.feeds()).values()
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_an_exported_llama_agrees_with_onnx_runtime_and_gradients_reach_its_weights() -> None:
    ort = pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
    transformers = pytest.importorskip("transformers", reason="the model is built by transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    layers, llama = 2, transformers.LlamaForCausalLM(config).eval()

    class Flat(torch.nn.Module):
        """The model with its cache as a flat list of tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.llama = llama

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: list[Any]) -> tuple[Any, ...]:
            cache = transformers.DynamicCache()
            for i in range(layers):
                cache.update(past[2 * i], past[2 * i + 1], i)
            out = self.llama(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
            )
            return out.logits, *(x for layer in out.past_key_values.layers for x in (layer.keys, layer.values))

    def arguments(batch: int, seq: int, past: int) -> tuple[Any, ...]:
        return (
            torch.randint(0, 64, (batch, seq)),
            torch.ones(batch, past + seq, dtype=torch.int64),
            torch.arange(past, past + seq).repeat(batch, 1),
            [torch.randn(batch, 2, past, 8) for _ in range(2 * layers)],
        )

    text = {0: "batch", 1: "seq"}
    exported = torch.onnx.export(
        Flat(), arguments(2, 3, 5), dynamo=True, opset_version=23, optimize=False, verbose=False,
        dynamic_shapes=(text, {0: "batch", 1: "total"}, text, [{0: "batch", 2: "past"}] * (2 * layers)),
    )  # fmt: skip
    model = exported.model
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    names = [v.name for v in model.graph.inputs]
    trained = [v for v in model.graph.initializers.values() if v.name.startswith("llama.") and "inv_freq" not in v.name]
    executor = Executor(model)
    executor.parameters = {v: executor.read(v).clone().requires_grad_() for v in trained}
    for sizes in ((2, 3, 5), (1, 4, 0)):
        ids, mask, positions, past = arguments(*sizes)
        feeds = dict(zip(names, [x.numpy() for x in (ids, mask, positions, *past)], strict=True))
        found = executor(feeds)
        for expected, actual in zip(session.run(None, feeds), found.values(), strict=True):
            np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    next(iter(found.values())).logsumexp(-1).sum().backward()
    assert len(trained) == 2 * 9 + 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in executor.parameters.values())

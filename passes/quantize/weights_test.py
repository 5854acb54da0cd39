"""The pass over small graphs, run by the manager, which executes each result in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.model import Model, set_role
from qc.ir.quant import Format, read_weight
from qc.ir.recurrent import STACKS, direction_weights
from qc.ir.runtime import Session
from qc.ir.text import parse
from qc.passes.base import Context, Outcome, Site
from qc.passes.canonicalize.recurrent import RecogniseRecurrent
from qc.passes.manager import PassManager, PassReport
from qc.passes.pipeline import Step, format_pipeline, parse_pipeline
from qc.passes.quantize.weights import QuantizeWeights, fitted

HIDDEN, VOCABULARY = 64, 128


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Builder:
    """Builds a graph node by node."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def input(self, name: str, shape: list, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
        return self.inputs[-1]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.initializers.append(value)
        return value

    def op(self, op_type: str, inputs: list, shape: list, **attributes: object) -> ir.Value:
        return self.add(ir.node(op_type, inputs, attributes), shape)

    def linear(self, x: ir.Value, weight: ir.Value, scope: str = "") -> ir.Value:
        node = dialect.linear(x, weight)
        if scope:
            node.metadata_props["qc.scope"] = scope
        return self.add(node, [*x.shape.dims[:-1], weight.shape[0]])

    def add(self, node: ir.Node, shape: list) -> ir.Value:
        self.nodes.append(node)
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"value{len(self.nodes)}", ir.DataType.FLOAT, ir.Shape(shape)
        return out

    def model(self, *outputs: ir.Value) -> Model:
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.initializers, opset_imports={"": 23}, name="g"
        )
        model = Model.of(ir.Model(graph, ir_version=10))
        dialect.sync_functions(model)
        return model


def language_model(*, tied: bool = True, dtype: type = np.float32) -> Model:
    """ids -> embedding -> two layers -> head -> logits."""
    b = Builder()
    ids = b.input("ids", ["batch", "seq"], ir.DataType.INT64)
    set_role(ids, "tokens")

    def weight(name: str, rows: int) -> ir.Value:
        stored = b.constant(name, normal(rows, HIDDEN).astype(dtype))
        if dtype is np.float32:
            return stored
        return b.op("Cast", [stored], [rows, HIDDEN], to=int(ir.DataType.FLOAT))

    table = weight("embed.weight", VOCABULARY)
    x = b.op("Gather", [table, ids], ["batch", "seq", HIDDEN])
    for i in range(2):
        x = b.linear(x, weight(f"layer{i}.weight", HIDDEN), f"layers.{i}")
    logits = b.linear(x, table if tied else weight("head.weight", VOCABULARY), "head")
    logits.name = "logits"
    set_role(logits, "logits")
    return b.model(logits)


def run(model: Model, *passes: QuantizeWeights, context: Context | None = None) -> tuple[Model, PassReport]:
    model, reports = PassManager([Step(p) for p in passes]).run(model, context=context)
    return model, reports[-1]


def by_name(report: PassReport) -> dict[str, Site]:
    return {s.name: s for s in report.sites}


def total(report: PassReport, fact: str) -> int:
    return sum(int(s.details[fact]) for s in report.sites)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "decibels"), [("int2", 4), ("uint2", 4), ("int4", 16), ("uint4", 16), ("int8", 38), ("uint8", 38)]
)
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("scale", ["f32", "f16"])
def test_every_format_runs_and_loses_little(name: str, decibels: float, group: int, scale: str) -> None:
    model, report = run(language_model(), QuantizeWeights(format=name, group=group, scale=scale))
    assert report.contract == "lossy"
    assert report.differences[0].sqnr > decibels - (3 if group == 0 else 0)
    assert {str(read_weight(n.inputs[1]).format) for n in model.graph if n.op_type == "Linear"} == {
        name + (f":g{group}" if group else "") + (":f16" if scale == "f16" else "")
    }
    assert model.graph.opset_imports[""] == (25 if "2" in name else 23)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float_weights_and_what_decoded_them_disappear(dtype: type) -> None:
    model, report = run(language_model(dtype=dtype), QuantizeWeights())
    assert [n.op_type for n in model.graph if n.op_type == "Cast"] == []
    assert all(name.endswith((".codes", ".scale")) for name in model.graph.initializers)
    assert total(report, "bytes_before") == (2 * HIDDEN + VOCABULARY) * HIDDEN * np.dtype(dtype).itemsize


def test_a_tied_embedding_and_head_share_their_codes() -> None:
    model, report = run(language_model(), QuantizeWeights())
    gather = next(n for n in model.graph if n.op_type == "Gather")
    head = next(n for n in model.graph if n.metadata_props.get("qc.scope") == "head" and n.op_type == "Linear")
    assert gather.inputs[0] is head.inputs[1]
    assert by_name(report)["head"].details["shared_with"] == "embed.weight"
    assert [by_name(report)[n].details["bytes_after"] for n in ("embed.weight", "head")] == [VOCABULARY * 40, 0]


def test_a_tied_weight_in_two_formats_is_stored_in_both() -> None:
    model, report = run(language_model(), QuantizeWeights(embedding="uint4:g32", head="int8"))
    formats = [by_name(report)[n].details["format"] for n in ("embed.weight", "head")]
    assert formats == ["uint4:g32", "int8"]
    assert "embed.weight" not in model.graph.initializers


def test_a_tied_weight_stays_for_the_consumer_that_wants_it_in_float() -> None:
    model, report = run(language_model(dtype=ml_dtypes.bfloat16), QuantizeWeights(embedding="float"))
    assert by_name(report)["embed.weight"].outcome is Outcome.SKIPPED
    assert "embedding in float" in by_name(report)["embed.weight"].reason
    assert by_name(report)["head"].outcome is Outcome.CHANGED
    assert "embed.weight" in model.graph.initializers
    assert total(report, "bytes_after") == sum(v.const_value.nbytes for v in model.graph.initializers.values())


def test_the_head_is_found_by_its_place_before_the_logits() -> None:
    _, report = run(language_model(tied=False), QuantizeWeights(head="float"))
    assert {n: s.outcome for n, s in by_name(report).items()} == {
        "embed.weight": Outcome.CHANGED,
        "layers.0": Outcome.CHANGED,
        "layers.1": Outcome.CHANGED,
        "head": Outcome.SKIPPED,
    }


def attention_layer(*, cached: bool) -> Model:
    """x -> queries, keys, values -> attention, whose values perhaps go to a cache."""
    b = Builder()
    x = b.input("x", [1, "seq", HIDDEN])
    q, k, v = (b.linear(x, b.constant(f"{n}.weight", normal(HIDDEN, HIDDEN)), n) for n in ("query", "key", "value"))
    outputs = []
    if cached:
        k, v = (outputs := [_behind_cache(b, n, new) for n, new in (("key", k), ("value", v))])
    out = b.op("Attention", [q, k, v], [1, "seq", HIDDEN], q_num_heads=2, kv_num_heads=2)
    return b.model(out, *outputs)


def _behind_cache(b: Builder, name: str, new: ir.Value) -> ir.Value:
    past = b.input(f"past.{name}", [1, "past", HIDDEN])
    present = b.op("Concat", [past, new], [1, "past + seq", HIDDEN], axis=1)
    set_role(past, f"past_{name}.0")
    set_role(present, f"present_{name}.0")
    return present


@pytest.mark.parametrize(
    ("cached", "options", "format"),
    [
        (False, {"cached_value": "same"}, "int8:g64"),
        (True, {}, "int8:g64"),
        (True, {"cached_value": "same"}, "uint4:g32"),
        (True, {"cached_value": "uint2:g32"}, "uint2:g32"),
    ],
)
def test_values_have_a_format_of_their_own_and_cached_ones_perhaps_another(
    cached: bool, options: dict, format: str
) -> None:
    _, report = run(attention_layer(cached=cached), QuantizeWeights(format="uint4", value="int8:g64", **options))
    found = {n: s.details.get("format") for n, s in by_name(report).items()}
    assert found == {"query": "uint4:g32", "key": "uint4:g32", "value": format}


def test_without_logits_no_layer_is_a_head() -> None:
    model = language_model(tied=False)
    model.graph.outputs[0].metadata_props.clear()
    _, report = run(model, QuantizeWeights(head="float"))
    assert by_name(report)["head"].outcome is Outcome.CHANGED


@pytest.mark.parametrize("how", ["option", "context"])
def test_excluded_sites_stay_as_they_are(how: str) -> None:
    patterns = ("^layers", "embed")
    action = QuantizeWeights(exclude=patterns) if how == "option" else QuantizeWeights()
    context = Context(exclude=patterns if how == "context" else ())
    model, report = run(language_model(tied=False), action, context=context)
    assert {s.name for s in report.sites if s.outcome is Outcome.CHANGED} == {"head"}
    assert by_name(report)["layers.1"].reason == "excluded by ^layers"
    assert {"layer0.weight", "layer1.weight", "embed.weight"} < set(model.graph.initializers)


def test_a_weight_of_several_layers_is_stored_once() -> None:
    b = Builder()
    x = b.input("x", ["batch", HIDDEN])
    weight = b.constant("w", normal(HIDDEN, HIDDEN))
    out = b.linear(b.linear(x, weight, "first"), weight, "second")
    model, report = run(b.model(out), QuantizeWeights())
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "Linear", "Linear"]
    assert total(report, "bytes_after") == HIDDEN * HIDDEN * 5 // 8
    assert total(report, "elements") == HIDDEN * HIDDEN


def test_running_the_pass_again_finds_everything_as_it_wants_it() -> None:
    model, _ = run(language_model(), QuantizeWeights(format="uint4"))
    model, report = run(model, QuantizeWeights(format="uint4"))
    assert not report.modified
    assert {s.outcome for s in report.sites} == {Outcome.MATCHED}


def test_weights_in_another_format_are_left_alone() -> None:
    model, _ = run(language_model(), QuantizeWeights(format="int8", group=0, embedding="float", head="float"))
    model, report = run(model, QuantizeWeights())
    assert by_name(report)["layers.0"].reason == "already quantized to int8"
    assert by_name(report)["head"].outcome is Outcome.CHANGED


def test_every_large_constant_that_stays_float_says_why() -> None:
    b = Builder()
    x = b.input("x", ["batch", 32, 16, 16])
    conv = b.op("ConvTranspose", [x, b.constant("kernel", normal(32, 32, 3, 3))], ["batch", 32, 18, 18])
    ids = b.input("ids", ["batch"], ir.DataType.INT64)
    cube = b.op("Gather", [b.constant("cube", normal(8, 32, 32)), ids], ["batch", 32, 32])
    column = b.op("Gather", [b.constant("columns", normal(128, 64)), ids], [128, "batch"], axis=1)
    rows = b.input("rows", ["batch", 80])
    experts = b.op(
        "MatMul",
        [
            b.op("Unsqueeze", [rows, b.constant("axes", np.array([1]))], ["batch", 1, 80]),
            b.constant("experts", normal(1, 80, 80)),
        ],
        ["batch", 1, 80],
    )
    plain = b.op("MatMul", [rows, b.constant("plain", normal(80, 80))], ["batch", 80])
    table = b.constant("positions", normal(64, 80))
    added = b.op("Add", [b.input("y", [64, 80]), table], [64, 80])
    short = b.linear(b.input("s", ["batch", 8]), b.constant("short", normal(600, 8)), "short")
    computed = b.linear(
        rows, b.op("Mul", [b.input("w", [80, 80]), b.constant("two", np.float32([2]))], [80, 80]), "hyper"
    )
    good = b.linear(rows, b.constant("good", normal(80, 80)), "good")
    _, report = run(b.model(conv, cube, column, experts, plain, added, short, computed, good), QuantizeWeights())
    reasons = {s.name: s.reason for s in report.sites if s.outcome is Outcome.SKIPPED}
    assert reasons == {
        "kernel": "weights of transposed convolutions are not quantized yet",
        "cube": "batched (expert) weights are not quantized yet",
        "columns": "looks up axis 1 of a table of rank 2; only rows of a matrix are quantized",
        "experts": "batched (expert) weights are not quantized yet",
        "plain": "a product that is not in canonical form (MatMul); canonicalize the model first",
        "positions": "Add is neither a product with a weight nor an embedding look-up",
        "short": "its rows of 8 are shorter than any kernel's group",
        "hyper": "its weight is computed, or stored in a form that no format describes",
    }


def convolution(group: int = 2) -> Model:
    b = Builder()
    x, kernel = b.input("x", ["batch", 6, 9, 9]), b.constant("kernel", normal(12, 6 // group, 3, 3))
    return b.model(b.op("Conv", [x, kernel], ["batch", 12, 7, 7], group=group))


@pytest.mark.parametrize(
    ("spelling", "scales", "group"),
    [("int8", 12, 2), ("uint8", 12, 2), ("int4", 12, 2), ("int8:tensor", 1, 2), ("int8:tensor", 1, 6)],
)
def test_a_convolution_is_decoded_by_the_standard_operator_with_its_kernel_in_place(
    spelling: str, scales: int, group: int
) -> None:
    original = convolution(group).graph.initializers["kernel"].const_value.numpy()
    model, report = run(convolution(group), QuantizeWeights(convolution=spelling))
    decode = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    assert tuple(decode.inputs[0].shape) == (12, 6 // group, 3, 3)
    assert decode.inputs[1].const_value.size == scales
    weight = read_weight(decode.outputs[0])
    assert weight is not None
    assert str(weight.format) == spelling
    # The verifying runtime decodes what we decode, and no element is further off than half a step.
    model.graph.outputs.append(decode.outputs[0])
    decoded = Session(model).run({"x": np.zeros((1, 6, 9, 9), np.float32)})[decode.outputs[0].name]
    np.testing.assert_array_equal(decoded, weight.numpy())
    step = np.abs(decode.inputs[1].const_value.numpy()).reshape(-1, 1, 1, 1)
    inside = np.abs(original) <= 0.8 * np.abs(original).max(axis=(1, 2, 3), keepdims=True)  # the range may be cut
    assert np.all(np.abs(decoded - original)[inside] <= 0.5001 * (step + 0 * original)[inside])
    assert report.sites[0].details["sqnr_db"] > (15 if "4" in spelling else 35)


def test_a_convolution_has_no_kernel_for_groups_of_weights_and_stays_float_if_asked() -> None:
    (site,) = QuantizeWeights(convolution="int4:g16")(convolution()).sites
    assert "one scale per output channel" in site.reason
    (site,) = QuantizeWeights(convolution="float")(convolution()).sites
    assert site.reason == "the recipe keeps the convolution in float"


def test_recurrent_layers_are_quantized_one_direction_at_a_time() -> None:
    """The weight of the input counts errors by what it is multiplied with, as a linear layer does."""
    model = parse(
        """f (float[t,1,64] x) => (float[t,2,1,64] y) {
            y = GRU <hidden_size = 64, direction = "bidirectional"> (x, w, r, b) }""",
        weights={"w": normal(2, 192, 64), "r": normal(2, 192, 64), "b": normal(2, 6 * 64)},
    )
    RecogniseRecurrent()(model)
    x = normal(9, 1, 64) * np.linspace(0.1, 4, 64, dtype=np.float32)
    quantized, report = run(model.clone(), QuantizeWeights(format="int4"), context=Context(calibration=[{"x": x}]))
    layer = next(node for node in quantized.graph if node.op_type == "GRU")
    assert [str(w.format) for slot in STACKS for w in direction_weights(layer.inputs[slot]) or []] == ["int4:g32"] * 4
    assert [site.name for site in report.sites] == ["w.0", "w.1", "r.0", "r.1"]
    assert all(site.outcome is Outcome.CHANGED for site in report.sites)
    _, alone = run(model.clone(), QuantizeWeights(format="int4", metric="none"))
    same = [a.details["sqnr_db"] == b.details["sqnr_db"] for a, b in zip(report.sites, alone.sites, strict=True)]
    assert same == [False, False, True, True]
    kept = QuantizeWeights(recurrent="float")(model).sites
    assert {site.reason for site in kept} == {"the recipe keeps the recurrent layer in float"}


def test_small_tables_are_not_weights_but_small_layers_are() -> None:
    b = Builder()
    ids = b.input("ids", ["batch"], ir.DataType.INT64)
    x = b.op("Gather", [b.constant("types", normal(2, 32)), ids], ["batch", 32])
    out = b.linear(x, b.constant("classifier", normal(3, 32)))
    _, report = run(b.model(out), QuantizeWeights())
    assert [s.name for s in report.sites] == ["classifier"]


def test_a_weight_with_nan_is_refused_by_name() -> None:
    b = Builder()
    array = normal(32, 32)
    array[3, 4] = np.nan
    model = b.model(b.linear(b.input("x", ["batch", 32]), b.constant("broken", array)))
    with pytest.raises(InputError, match="'broken'"):
        QuantizeWeights().call(model)


@pytest.mark.parametrize(
    ("spelling", "columns", "expected"),
    [
        ("int4:g32", 64, 32),
        ("int4:g32", 48, 16),
        ("int4:g128", 64, 64),
        ("int4:g128", 192, 64),
        ("int4:g128", 4096 + 64, 128),
        ("int4:g128", 4096 + 120, 128),
        ("int8:g32", 40, 16),
        ("int4:g32", 8, 16),
        ("int4:g48", 96, 48),
    ],
)
def test_the_group_is_halved_only_where_padding_would_cost_more(spelling: str, columns: int, expected: int) -> None:
    assert fitted(Format.parse(spelling), columns).group == expected


def test_a_changed_group_is_explained() -> None:
    b = Builder()
    model = b.model(b.linear(b.input("x", ["batch", 48]), b.constant("w", normal(64, 48))))
    _, report = run(model, QuantizeWeights())
    assert report.sites[0].details["format"] == "int4:g16"
    assert "16 instead of 32" in str(report.sites[0].details["group"])


@pytest.mark.parametrize("spec", ["format=int4", "format=uint4,scale=f16", "format=uint2", "format=int8,group=0"])
def test_reported_bytes_are_the_bytes_on_disk(spec: str, tmp_path: Path) -> None:
    model, reports = PassManager(parse_pipeline(f"quantize-weights{{{spec}}}")).run(language_model())
    model.save(tmp_path)
    inline = sum(t.nbytes for t in _inline(tmp_path))
    assert total(reports[0], "bytes_after") == (tmp_path / "model.onnx.data").stat().st_size + inline
    sites = [s for s in reports[0].sites if s.details["bytes_after"]]
    assert (
        sum(s.details["bits_per_weight"] * s.details["elements"] for s in sites) == total(reports[0], "bytes_after") * 8
    )


def _inline(directory: Path) -> list[ir.TensorProtocol]:
    loaded = Model.load(directory)
    held = [v.const_value for v in loaded.graph.initializers.values()]
    return [t for t in held if not isinstance(t, ir.ExternalTensor)]


def test_the_same_model_gives_the_same_bytes_with_any_number_of_threads(tmp_path: Path) -> None:
    files = []
    for threads in (1, 3):
        model, _ = run(language_model(), QuantizeWeights(format="uint4"), context=Context(threads=threads))
        model.save(tmp_path / str(threads))
        files.append((tmp_path / str(threads) / "model.onnx.data").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "options",
    [
        {"format": "int9"},
        {"format": "int4:32"},
        {"group": -1},
        {"scale": "f64"},
        {"embedding": "int1"},
        {"head": "none"},
        {"assign": "guess"},
        {"sweeps": 1},
        {"exclude": ("(",)},
    ],
)
def test_impossible_options_are_refused_when_the_pass_is_built(options: dict) -> None:
    with pytest.raises(InputError):
        QuantizeWeights(**options)


def test_gptq_keeps_more_of_the_outputs_and_shares_what_it_knows_of_an_input() -> None:
    def layers() -> Model:
        b = Builder()
        x = b.input("x", ["batch", 64])
        return b.model(b.linear(x, b.constant("a", normal(64, 64))), b.linear(x, b.constant("b", normal(96, 64))))

    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 256, 8)) @ rng.standard_normal((8, 64))).astype(np.float32)
    x += 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    calibration, found = [{"x": batch} for batch in x], {}
    for assign in ("search", "gptq"):
        steps = [QuantizeWeights(format="uint4", assign=assign)]
        _, (report,) = PassManager(steps).run(layers(), calibration=calibration, probe=calibration)
        found[assign] = [d.sqnr for d in report.differences]
    assert all(new > old + 6 for old, new in zip(found["search"], found["gptq"], strict=True))
    assert all(s.details["output_sqnr_db"] > s.details["sqnr_db"] for s in report.sites)


def test_inputs_that_are_always_zero_are_reported() -> None:
    b = Builder()
    model = b.model(b.linear(b.input("x", ["batch", 64]), b.constant("w", normal(64, 64))))
    x = normal(50, 64)
    x[:, :3] = 0
    _, (report,) = PassManager([QuantizeWeights(assign="gptq")]).run(model, calibration=[{"x": x}])
    assert "3 of 64" in str(report.sites[0].details["inputs"])


def test_options_survive_the_spelling_as_a_pipeline() -> None:
    text = "quantize-weights{format=uint4,group=0,scale=f16,embedding=float,head=int8:g64,exclude=[a,b]}"
    assert format_pipeline(parse_pipeline(text)) == text

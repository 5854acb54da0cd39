"""What ONNX Runtime runs on a CPU, and what it runs well.

Two sources. The *registry* of the installed runtime says which operators have a kernel for which types; it is asked on
first use. The registry knows no attribute values, so *limits* on them are a table here, one reason each, and
tests/test_ort_capability.py proves every row against the installed runtime.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qc.ir.errors import UnsupportedError
from qc.passes.base import site_name

__all__ = [
    "ARM_LIMITS",
    "LIMITS",
    "MATMUL_BLOCKS",
    "WEB_LIMITS",
    "Limit",
    "facts_of",
    "has_kernel",
    "limit_of",
    "matmul_limit",
    "require_kernels",
]

MATMUL_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ``MatMulNBits`` and ``GatherBlockQuantized`` accept."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """Attribute values with which an operator has no kernel, or a slow one.

    Attributes:
        op: ``domain::op_type``.
        facts: Attribute values (and presence or type of optional inputs) for which the limit holds, all at once.
        runs: True if the runtime accepts such a node and is merely slow.
        reason: Why, and what to choose instead.
    """

    op: str
    facts: Mapping[str, frozenset]
    runs: bool
    reason: str


_MATMUL = "com.microsoft::MatMulNBits"

LIMITS: tuple[Limit, ...] = (
    Limit(
        _MATMUL,
        {"bits": frozenset({1, 3, 5, 6, 7})},
        runs=False,
        reason="the CPU kernel has 2, 4 and 8 bits only; choose one of these",
    ),
    Limit(
        _MATMUL,
        {"bits": frozenset({2, 8}), "accuracy_level": frozenset({0, 1, 2, 3})},
        runs=True,
        reason="with float activations 2 and 8 bits are decoded whole on each call, 10 to 25 times slower than a float "
        "weight; choose accuracy level 4, or 4 bits",
    ),
    Limit(
        _MATMUL,
        {"bits": frozenset({2}), "block_size": frozenset({16, 256})},
        runs=True,
        reason="the 2-bit kernel has blocks of 32, 64 and 128; for others the whole weight is decoded on each call, 10 "
        "times slower than a float weight; choose group 32, 64 or 128",
    ),
    Limit(
        _MATMUL,
        {"zero_points": frozenset({"float"})},
        runs=True,
        reason="float zero points switch the int8 kernels off; choose integer zero points",
    ),
    Limit(
        _MATMUL,
        {"g_idx": frozenset({True})},
        runs=True,
        reason="a group index switches the int8 kernels off; permute the channels in front instead",
    ),
    Limit(
        "com.microsoft::MatMulBnb4",
        {},
        runs=True,
        reason="4-bit float tables are decoded whole on each call, 5 times slower than a float weight; choose int4",
    ),
)
"""Measured with version 1.31.1; benchmarks/ort_kernels.py has the times."""


ARM_LIMITS: tuple[Limit, ...] = (
    *LIMITS,
    Limit(
        _MATMUL,
        {"bits": frozenset({2})},
        runs=True,
        reason="arm64 has no 2-bit kernel: the weight is decoded on each call; choose 4 bits",
    ),
)
"""What is slow on arm64: from the table of kernels in ONNX Runtime's source, not measured."""

WEB_LIMITS: tuple[Limit, ...] = (
    Limit(
        _MATMUL,
        {},
        runs=True,
        reason="WebAssembly has no kernel for it: slower than a float weight, 9 times for one token; choose int8 per "
        "channel with 8-bit activations, or let the weight be decoded at load",
    ),
    Limit(
        "com.microsoft::MatMulIntegerToFloat",
        {"activations": frozenset({"int8"})},
        runs=True,
        reason="WebAssembly multiplies signed activations 6 to 13 times slower than unsigned ones; choose uint8",
    ),
)
"""What is slow in WebAssembly; measured with onnxruntime-web 1.30.0 by benchmarks/web.py."""


def limit_of(op: str, facts: Mapping[str, object], limits: Sequence[Limit] = LIMITS) -> Limit | None:
    """The first of the limits that a node of `op` with these facts runs into, or None."""
    for limit in limits:
        if limit.op == op and all(facts.get(key) in values for key, values in limit.facts.items()):
            return limit
    return None


def matmul_limit(bits: int, block: int, accuracy_level: int) -> Limit | None:
    """The limit on a ``MatMulNBits`` with integer or no zero points, or None if it is fast."""
    return limit_of(_MATMUL, {"bits": bits, "block_size": block, "accuracy_level": accuracy_level})


def facts_of(node: ir.Node) -> dict[str, object]:
    """What `Limit.facts` refers to: the integer attributes of a node and its optional inputs."""
    facts: dict[str, object] = {
        name: a.as_int() for name, a in node.attributes.items() if a.type == ir.AttributeType.INT
    }
    if node.op_type == "MatMulNBits":
        facts.setdefault("bits", 4)
        facts.setdefault("accuracy_level", 0)
        zero_points, g_idx = (*node.inputs[3:5], None, None)[:2]
        if zero_points is not None:
            floating = zero_points.dtype is not None and zero_points.dtype.is_floating_point()
            facts["zero_points"] = "float" if floating else "integer"
        facts["g_idx"] = g_idx is not None
    if node.op_type == "MatMulIntegerToFloat" and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        facts["activations"] = node.inputs[0].dtype.name.lower()
    return facts


def has_kernel(node: ir.Node, imports: Mapping[str, int]) -> bool:
    """Whether the installed runtime executes `node`, by a CPU kernel for its types or by expanding it.

    The registry says yes at once; where it does not know the types (the runtime casts float16, and expands operators
    that are functions), a model of that node alone is loaded.

    Args:
        node: The node.
        imports: The model's opset by domain.
    """
    if node.domain == "" and node.op_type == "Constant":
        return True
    if any(_accepts(node, types) for types in _registry().get((node.domain, node.op_type), ())):
        return True
    if (node.domain, node.op_type) not in _type_variables():
        return False
    return _loads(node, imports)


def require_kernels(model: ir.Model) -> None:
    """Checks that the runtime can execute every node.

    Raises:
        UnsupportedError: Listing each operator without a kernel and the nodes that use it.
    """
    local = {key[:2] for key in model.functions}
    missing: dict[str, list[str]] = {}
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) not in local and not has_kernel(node, model.graph.opset_imports):
            types = ", ".join(v.dtype.name.lower() for v in node.inputs if v is not None and v.dtype is not None)
            missing.setdefault(f"{node.domain or 'ai.onnx'}::{node.op_type}({types})", []).append(site_name(node))
    if missing:
        import onnxruntime

        lines = "".join(f"\n  {op}: {', '.join(names[:4])}{' ...' * (len(names) > 4)}" for op, names in missing.items())
        raise UnsupportedError(
            f"Expected operators that ONNX Runtime {onnxruntime.__version__} can run on a CPU, found {len(missing)} "
            f"without a kernel:{lines}\nReplace them in the source, export it with another opset, or install a runtime "
            "that has them."
        )


def _accepts(node: ir.Node, kernel: Mapping[str, frozenset[str]]) -> bool:
    """Whether a kernel with those types by variable takes the inputs of `node`; an unknown type fits anything."""
    variables = _type_variables().get((node.domain, node.op_type), ())
    for position, value in enumerate(node.inputs):
        if value is None or value.dtype is None or not variables:
            continue
        allowed = kernel.get(variables[min(position, len(variables) - 1)])
        if allowed is not None and f"tensor({value.dtype.name.lower()})" not in allowed:
            return False
    return True


@functools.cache
def _registry() -> dict[tuple[str, str], list[dict[str, frozenset[str]]]]:
    """The types by variable of each CPU kernel, by (domain, operator)."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], list[dict[str, frozenset[str]]]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            types = {name: frozenset(allowed) for name, allowed in kernel.type_constraints.items()}
            found.setdefault((kernel.domain, kernel.op_name), []).append(types)
    return found


@functools.cache
def _type_variables() -> dict[tuple[str, str], tuple[str, ...]]:
    """The type variable of each input by (domain, operator), of the newest schema; variadic ones repeat the last."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    newest: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}
    for schema in state.get_all_operator_schema():
        key = (schema.domain, schema.name)
        if schema.since_version >= newest.get(key, (0, ()))[0]:
            newest[key] = (schema.since_version, tuple(i.typeStr for i in schema.inputs))
    return {key: variables for key, (_, variables) in newest.items()}


def _loads(node: ir.Node, imports: Mapping[str, int]) -> bool:
    """Whether the runtime loads a model of `node` alone."""
    import onnxruntime as ort
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    def port(value: ir.Value | None, name: str) -> ir.Value | None:
        return None if value is None else ir.Value(name=name, type=value.type, shape=value.shape)

    held = [port(v, f"i{n}") for n, v in enumerate(node.inputs)]
    alone = ir.Node(node.domain, node.op_type, held, node.attributes.values(), num_outputs=len(node.outputs))
    for n, (new, old) in enumerate(zip(alone.outputs, node.outputs, strict=True)):
        new.name, new.type = f"o{n}", old.type
    inputs = [v for v in held if v is not None]
    graph = ir.Graph(inputs, [v for v in alone.outputs if v.type is not None], nodes=[alone], name="probe")
    graph.opset_imports.update(imports)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        proto = ir.to_proto(ir.Model(graph, ir_version=10))
        ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    except state.NotImplemented:
        return False
    except (state.Fail, state.InvalidGraph, state.InvalidArgument) as error:
        # A node that cannot stand alone is no evidence.
        return "No Op registered" not in str(error)
    return True

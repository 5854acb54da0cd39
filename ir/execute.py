"""Runs a graph, or a region of one, in torch: differentiable, on the CPU or on CUDA, with weights read as needed.

`Executor` makes a plan once: the nodes that the wanted outputs need, in graph order, each with the operator function
that computes it and with the values that nobody needs afterwards. A weight is read (memory-mapped, where it lies in a
file) by the first step that uses it and let go after the last, so memory holds what is alive, not the model.

Where to look: the operators are a table in the ``_torch_*`` modules (`qc.ir._torch_ops` says how to add one). A
model-local function without an entry there is run by its body.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qc.ir.errors import InputError, InternalError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from qc.ir import _torch_ops

__all__ = ["Executor", "supported_ops"]


def supported_ops() -> tuple[str, ...]:
    """The operators that can run, sorted: ``Add``, ``com.microsoft::MatMulNBits``, ..."""
    return tuple(sorted(f"{domain}::{name}" if domain else name for domain, name in _table().supported()))


@functools.cache
def _table():
    """The operator table, imported on first use: it imports torch."""
    from qc.ir import _torch_ops

    _torch_ops.load()
    return _torch_ops


@dataclasses.dataclass
class _Plan:
    """What to run.

    Attributes:
        inputs: Values that are given.
        used: Those of them that the steps read.
        outputs: Values that are wanted.
        captures: Values of enclosing graphs that the steps read.
        steps: The nodes, in order.
    """

    inputs: tuple[ir.Value, ...]
    used: frozenset[ir.Value]
    outputs: tuple[ir.Value, ...]
    captures: tuple[ir.Value, ...]
    steps: list[_Step]


@dataclasses.dataclass
class _Step:
    """One node of a plan.

    Attributes:
        call: The node as its operator function sees it.
        op: The operator, or None when `function` is to be run instead.
        function: Plan of the body of a model-local function.
        bodies: Plans of the subgraphs, by attribute name.
        kept: Outputs that somebody needs, with their positions.
        dead: Values that nobody needs after this step.
    """

    call: _torch_ops.Call
    op: _torch_ops.Op | None
    function: _Plan | None
    bodies: dict[str, _Plan]
    kept: tuple[tuple[int, ir.Value], ...] = ()
    dead: tuple[ir.Value, ...] = ()

    def uses(self) -> list[ir.Value]:
        """Values that the node reads, in its subgraphs too."""
        direct = [v for v in self.call.node.inputs if v is not None]
        return direct + [v for plan in self.bodies.values() for v in plan.captures]


class Executor:
    """Computes outputs of a graph from its inputs in torch; every floating operator is differentiable.

    The graph is not copied: make a new `Executor` after changing it. Weights are not copied either when they are
    already in the type and on the device of the run, so results must not be written into.

    Attributes:
        parameters: Tensors that replace values of the graph: an initializer, or any computed value, such as the output
            of a decode node (whose inputs are then neither read nor computed). May be changed between calls. A weight
            that many calls need can be kept loaded by ``executor.parameters[v] = executor.read(v)``.
        peak: The largest number of values that were held at once in the last call.
    """

    def __init__(
        self,
        model: ir.Model | ir.Graph,
        *,
        inputs: Sequence[ir.Value] | None = None,
        outputs: Sequence[ir.Value | str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        straight_through: bool = False,
        parameters: Mapping[ir.Value, torch.Tensor] | None = None,
    ) -> None:
        """Plans a run.

        Args:
            model: A model, or a graph that uses no model-local function without an operator of ours.
            inputs: Values to be given; the graph's inputs if None.
            outputs: Values to compute, or their names; the graph's outputs if None. Any value of the graph will do.
            device: Where to compute. Shapes are computed on the CPU always.
            dtype: A floating type to compute in, in place of float16, bfloat16, float32 and float64 alike: casts
                between those do nothing then, so float64 shows what a graph means without its rounding.
            straight_through: Whether quantizing passes gradients as if it did not round. Quantized activations are then
                floats that hold integers.
            parameters: Initial `parameters`.

        Raises:
            InputError: If an output does not exist, or depends on values that are not among `inputs`.
            UnsupportedError: If a needed node's operator is unknown here and has no body.
        """
        import torch

        self._graph = model.graph if isinstance(model, ir.Model) else model
        self._functions = dict(model.functions) if isinstance(model, ir.Model) else {}
        self._context = _table().Context(torch.device(device), dtype, straight_through)
        self._inputs = tuple(self._graph.inputs if inputs is None else inputs)
        self._outputs = tuple(self._find(v) for v in (self._graph.outputs if outputs is None else outputs))
        self.parameters: dict[ir.Value, torch.Tensor] = dict(parameters or {})
        self.peak = 0
        self._planned_for: frozenset[ir.Value] | None = None
        self._ready()

    @classmethod
    def block(
        cls, model: ir.Model | ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], **options: Any
    ) -> Executor:
        """An executor of the region between `inputs` and `outputs`; `options` are those of the constructor.

        Raises:
            InputError: If `outputs` depend on a graph input that is not among `inputs`; the message lists those.
        """
        return cls(model, inputs=inputs, outputs=outputs, **options)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Computes the outputs.

        Args:
            inputs: Tensors or arrays by input name. Those that the outputs do not depend on may be left out. They are
                converted to the declared element type.

        Returns:
            The outputs by name, on the device of the run. 2- and 4-bit integers come in bytes.

        Raises:
            InputError: If an input is missing, unknown or of the wrong kind, or an operator rejects its inputs.
        """
        plan = self._ready()
        known = {value.name: value for value in self._inputs}
        unknown = sorted(set(inputs) - set(known))  # type: ignore[arg-type]
        if unknown:
            raise InputError(f"The graph has no inputs {unknown}. Its inputs are {sorted(map(str, known))}.")
        env = {known[name]: self._given(known[name], array) for name, array in inputs.items()}
        missing = sorted(str(v.name) for v in plan.used if v not in env and v.const_value is None)
        if missing:
            raise InputError(f"The outputs depend on inputs {missing}, which were not given. Give a tensor for each.")
        self.peak = 0
        return {str(v.name): tensor for v, tensor in zip(plan.outputs, self._run(plan, env), strict=True)}

    def read(self, value: ir.Value) -> torch.Tensor:
        """The tensor of an initializer as the steps see it: in the type and on the device of the run.

        A scalar or a short integer vector, such as a shape, stays on the host.

        Raises:
            InputError: If `value` is not an initializer.
        """
        if value.const_value is None:
            raise InputError(f"Value {value.name!r} is not an initializer, so it has no tensor to read.")
        table = _table()
        return table.place(table.to_torch(value.const_value, self._context), self._context)

    def _find(self, value: ir.Value | str) -> ir.Value:
        if isinstance(value, ir.Value):
            return value
        values = [*self._graph.inputs, *self._graph.initializers.values(), *(o for n in self._graph for o in n.outputs)]
        found = next((v for v in values if v.name == value), None)
        if found is None:
            raise InputError(f"Expected a value of the graph, found no value named {value!r}. Check the name.")
        return found

    def _given(self, value: ir.Value, array: Any) -> torch.Tensor:
        tensor = self._held(array)
        if value.dtype is None:
            return tensor
        wanted = self._context.torch_dtype(value.dtype)
        if tensor.dtype == wanted or (self._context.straight_through and tensor.is_floating_point()):
            return tensor
        if tensor.is_floating_point() != wanted.is_floating_point or "bool" in f"{tensor.dtype} {wanted}":
            raise InputError(f"Input {value.name!r} expects {value.dtype}, found {tensor.dtype}. Convert it first.")
        return tensor.to(wanted)

    def _held(self, array: Any) -> torch.Tensor:
        return _table().to_torch(array, self._context).to(self._context.device)

    def _ready(self) -> _Plan:
        """The plan for the values that `parameters` replaces now."""
        replaced = frozenset(self.parameters)
        if replaced != self._planned_for:
            self._plan = self._make_plan(self._graph, self._inputs, self._outputs, self._graph.opset_imports, {})
            needed = [v for v in self._plan.captures if v.const_value is None]
            if needed:
                names = sorted(str(v.name) for v in needed)
                raise InputError(
                    f"The outputs depend on values {names}, which are not among the inputs. Add them to the inputs."
                )
            self._planned_for = replaced
        return self._plan

    def _make_plan(
        self,
        nodes: Iterable[ir.Node],
        inputs: tuple[ir.Value, ...],
        outputs: tuple[ir.Value, ...],
        opsets: Mapping[str, int],
        scope: Mapping[str, ir.Attr],
    ) -> _Plan:
        """Selects what `outputs` need, walking backwards from them, and notes where each value is used last.

        Args:
            nodes: A graph or function, or its nodes in order.
            inputs: Values that are given.
            outputs: Values that are wanted.
            opsets: Opset by domain.
            scope: Attributes of the enclosing function call.
        """
        stops = {*inputs, *self.parameters}
        needed = dict.fromkeys(outputs)
        steps: list[_Step] = []
        for node in reversed(list(nodes)):
            kept = tuple((i, v) for i, v in enumerate(node.outputs) if v in needed and v not in stops)
            if not kept:
                continue
            step = self._make_step(node, opsets, scope)
            step.kept = kept
            uses = step.uses()
            # Walking backwards, a value met for the first time is met at its last use.
            step.dead = tuple(dict.fromkeys(v for v in uses if v not in needed))
            needed.update(dict.fromkeys(uses))
            steps.append(step)
        steps.reverse()
        made = {v for step in steps for _, v in step.kept}
        outside = [v for v in needed if v not in made and v not in stops]
        captures = tuple(v for v in outside if v.const_value is None or v.is_graph_input())
        used = frozenset(v for v in inputs if v in needed and v not in self.parameters)
        return _Plan(inputs, used, outputs, captures, steps)

    def _make_step(self, node: ir.Node, opsets: Mapping[str, int], scope: Mapping[str, ir.Attr]) -> _Step:
        attributes = {}
        for name, attribute in node.attributes.items():
            found = scope.get(attribute.ref_attr_name or "") if attribute.is_ref() else attribute
            if found is not None:
                attributes[name] = found
        domain = "" if node.domain == "ai.onnx" else node.domain
        opset = node.version or opsets.get(domain, opsets.get("ai.onnx", 1) if not domain else 1)
        table = _table()
        call = table.Call(node, opset, self._context, attributes)
        op = table.lookup(domain, node.op_type, opset)
        if op is not None:
            graphs = {n: a.as_graph() for n, a in attributes.items() if a.type == ir.AttributeType.GRAPH}
            bodies = {
                n: self._make_plan(g, tuple(g.inputs), tuple(g.outputs), opsets, scope) for n, g in graphs.items()
            }
            return _Step(call, op, None, bodies)
        function = self._functions.get((node.domain, node.op_type, node.overload))
        if function is None:
            raise UnsupportedError(
                f"The torch executor does not know the operator {node.op_type} of domain {domain or 'ai.onnx'!r} at "
                f"opset {opset} (node {node.name!r}), and the model has no function body for it. "
                "qc.ir.execute.supported_ops() lists what it knows; run this part of the model with ONNX Runtime."
            )
        bound = {n: a for n, a in function.attributes.items() if a.value is not None} | attributes
        body = self._make_plan(function, tuple(function.inputs), tuple(function.outputs), function.opset_imports, bound)
        return _Step(call, None, body, {})

    def _run(self, plan: _Plan, env: dict[ir.Value, torch.Tensor]) -> list[torch.Tensor]:
        """Runs a plan; `env` holds what is alive, and loses what dies."""
        for step in plan.steps:
            inputs = [None if v is None else self._fetch(v, env) for v in step.call.node.inputs]
            results = self._apply(step, inputs, env)
            env.update((v, results[i]) for i, v in step.kept)
            self.peak = max(self.peak, len(env))
            del inputs, results
            for value in step.dead:
                env.pop(value, None)
        return [self._fetch(v, env) for v in plan.outputs]

    def _fetch(self, value: ir.Value, env: dict[ir.Value, torch.Tensor]) -> torch.Tensor:
        if value not in env:
            replaced = self.parameters.get(value)
            env[value] = self.read(value) if replaced is None else self._held(replaced)
        return env[value]

    def _apply(
        self, step: _Step, inputs: list[torch.Tensor | None], env: dict[ir.Value, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        import torch

        if step.function is not None:
            return self._enter(step.function, inputs, {})
        if step.op is None:
            raise InternalError(f"node {step.call.node.name!r} was planned with nothing to run it")
        call = step.call
        if step.bodies:
            call = dataclasses.replace(call, body=functools.partial(self._run_body, step, env))
        if self._context.device.type != "cpu":
            inputs = self._together(step.op, inputs)
        try:
            results = step.op.function(call, *inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            node, given = call.node, ", ".join("none" if x is None else f"{x.dtype}{list(x.shape)}" for x in inputs)
            raise InputError(
                f"Node {node.name!r} ({node.op_type}, opset {call.opset}) cannot run on inputs ({given}): {error}"
            ) from error
        return results if isinstance(results, tuple) else (results,)

    def _run_body(
        self, step: _Step, env: dict[ir.Value, torch.Tensor], name: str, inputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        plan = step.bodies[name]
        return self._enter(plan, inputs, {v: self._fetch(v, env) for v in plan.captures})

    def _enter(
        self, plan: _Plan, inputs: Sequence[torch.Tensor | None], env: dict[ir.Value, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Runs a function body or a subgraph on positional inputs; an optional input that is absent stays absent."""
        given = [*inputs, *[None] * (len(plan.inputs) - len(inputs))]
        env.update((v, x) for v, x in zip(plan.inputs, given, strict=True) if v in plan.used)  # type: ignore[misc]
        return self._run(plan, env)

    def _together(self, op: _torch_ops.Op, inputs: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Moves inputs to the device if any of them is there; else the operator computes a shape, on the host."""
        device = self._context.device.type
        moving = [x is not None and i not in op.host for i, x in enumerate(inputs)]
        if not any(m and x.device.type == device for m, x in zip(moving, inputs, strict=True) if x is not None):
            return inputs
        return [x.to(self._context.device) if m and x is not None else x for m, x in zip(moving, inputs, strict=True)]

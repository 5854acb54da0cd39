"""Stores weights in a few bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.probe import find_inputs
from qc.ir.quant import Format, QuantizedTensor, Weight, emit, named_formats, read_weight, require_opset
from qc.ir.runtime import Session
from qc.ir.store import release
from qc.passes.base import BlockPass, Context, Contract, Lossy, Outcome, Result, Site, check_patterns
from qc.passes.quantize._columns import takes
from qc.passes.quantize._fisher import FISHER_BYTES, FISHER_TOKENS, fisher
from qc.passes.quantize._sites import Kind, Use, weight_uses
from qc.passes.quantize.assign import assign, sqnr_db
from qc.passes.quantize.gptq import Hessian, gptq, output_sqnr_db, working_bytes
from qc.passes.statistics import SYNTHETIC_SIZES, Request, Statistic

__all__ = ["SHORTEST_GROUP", "QuantizeWeights", "fitted"]

_GRAM_TOKENS = 16384
"""Second moments of pairs want several tokens per channel, or they describe the text instead of the layer."""

SHORTEST_GROUP = 16
"""The shortest group that blocked kernels take."""


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(BlockPass):
    """Quantizes the weights of linear and recurrent layers, convolutions and embeddings.

    Each weight ``w`` of shape ``[N, K]`` becomes codes, scales and perhaps zero points behind a decode node such that
    ``sum_k m_k (w_k - decoded_k)^2`` of every group is small (see `qc.passes.quantize.assign`), where ``m_k`` is the
    second moment ``E[x_k^2]`` of the input channel, or one. A weight that several consumers read in the same format,
    such as a tied embedding and head, is quantized and stored once. That of a convolution counts as a matrix whose rows
    have all that makes one output channel.

    A format that `qc.passes.allocate` gave a weight goes before those of the options.

    Every node that reads a large constant is a site; the ones that stay float say why. Scope: the main graph.

    Attributes:
        format: Values of the codes, such as int4 (symmetric), uint4 (asymmetric) or nf4; or a full spelling such as
            nf4:g64:q8x256 or mxfp4, to which group and scale do not apply. `qc formats` lists them.
        group: Elements along K that share a scale; 0 for one scale per output channel.
        scale: Storage of the scales, such as f32 or f16.
        embedding: Format of embedding tables: same, float, or a full spelling such as uint4:g32.
        head: Format of the output projection, the Linear right before the logits: same, float, or a full spelling.
        value: Format of the projections that make an attention's values: same, float, or a full spelling. They are
            small and their error reaches the output undamped, so a few more bits here pay.
        cached_value: Format of those whose values go to a cache: value (the option), same, float, or a full spelling.
            With a cache each token reads every weight anew, and kernels multiply queries, keys and values at once only
            in one format.
        convolution: Format of convolutions: float, or a full spelling with one scale per output channel or in all, such
            as int8 or int8:tensor, which is what the kernels of runtimes multiply.
        recurrent: Format of recurrent layers: same, float, or a full spelling.
        metric: What errors count: moment (that of a column by ``E[x_k^2]``, collected on calibration inputs), fisher
            (that of each element by the squared gradient of the loss on them; see `qc.passes.quantize._fisher`) or
            none.
        assign: How codes are chosen: search (the range of each group is searched, codes are nearest) or gptq (in
            linear layers, later columns make up for the errors of earlier ones; see `qc.passes.quantize.gptq`).
        sweeps: After gptq, how often codes and scales are improved once more.
        exclude: Regular expressions of sites or weights to leave as they are.
    """

    contract: ClassVar[Contract] = Lossy()

    format: str = "int4"
    group: int = 32
    scale: str = "f32"
    embedding: str = "same"
    head: str = "same"
    value: str = "same"
    cached_value: str = "value"
    convolution: str = "int8"
    recurrent: str = "same"
    metric: str = "moment"
    assign: str = "search"
    sweeps: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.group < 0:
            raise InputError(f"Expected a group of at least 1, or 0 for per channel; found {self.group}.")
        if self.metric not in ("moment", "fisher", "none"):
            raise InputError(f"Expected a metric of moment, fisher or none, found {self.metric!r}.")
        if self.assign not in ("search", "gptq"):
            raise InputError(f"Expected codes chosen by search or gptq, found {self.assign!r}.")
        if self.metric == "fisher" and self.assign == "gptq":
            raise InputError("Expected metric=fisher with assign=search: gptq counts errors by pairs of columns.")
        if self.sweeps < 0 or (self.sweeps and self.assign != "gptq"):
            raise InputError(f"Expected sweeps of at least 0, and of 0 without gptq; found {self.sweeps}.")
        check_patterns(self.exclude)
        formats = self._formats()
        for kind in (Kind.LINEAR, Kind.HEAD, Kind.VALUE, Kind.CACHED_VALUE, Kind.RECURRENT):
            wanted = formats[kind]
            if self.assign == "gptq" and wanted is not None and not takes(wanted):
                raise InputError(
                    f"Expected a format of groups or vectors along K or N for gptq, found {wanted} for the "
                    f"{kind.value}. Choose assign=search."
                )

    @property
    def main_format(self) -> Format:
        """The format of everything but embeddings and heads with one of their own."""
        values = named_formats().get(self.format)
        if values is None or str(values) != self.format or not values.values.scaled:
            return Format.parse(self.format)
        group = f":g{self.group}" if self.group else ""
        return Format.parse(f"{self.format}{group}:{self.scale}")

    def _formats(self) -> Mapping[Kind, Format | None]:
        """The wanted format of each kind of site, None for float."""
        body = self.main_format

        def choice(text: str) -> Format | None:
            if text == "same":
                return body
            return None if text == "float" else Format.parse(text)

        choices = {
            Kind.HEAD: self.head,
            Kind.EMBEDDING: self.embedding,
            Kind.VALUE: self.value,
            Kind.CACHED_VALUE: self.value if self.cached_value == "value" else self.cached_value,
            Kind.CONVOLUTION: self.convolution,
            Kind.RECURRENT: self.recurrent,
        }
        return {Kind.LINEAR: body} | {kind: choice(text) for kind, text in choices.items()}

    def needs(self, model: ir.Model) -> list[Request]:
        statistic = self._statistic
        if statistic is None:
            return []
        return [r for use in weight_uses(model) if (r := use.statistic(statistic)) is not None]

    @property
    def sequential(self) -> bool:
        return self.assign == "gptq"

    @property
    def whole(self) -> bool:
        return self.metric == "fisher"

    @property
    def calibration_tokens(self) -> int:
        if self.metric == "fisher":
            return FISHER_TOKENS
        return _GRAM_TOKENS if self.assign == "gptq" else super().calibration_tokens

    @property
    def bytes_per_parameter(self) -> int:
        return FISHER_BYTES if self.metric == "fisher" else 0

    def bytes_for(self, columns: int) -> int:
        return working_bytes(columns) if self.assign == "gptq" else 0

    @property
    def _statistic(self) -> Statistic | None:
        """What is asked about the input of each Linear."""
        if self.assign == "gptq":
            return Statistic.GRAM
        return Statistic.SECOND_MOMENT if self.metric == "moment" else None

    def _changes(self, use: Use, context: Context) -> bool:
        """Whether a float weight will be quantized, as far as options tell."""
        if use.reason or use.weight is None or use.weight.format is not None:
            return False
        excluded = dataclasses.replace(context, exclude=(*context.exclude, *self.exclude), used_patterns=set())
        wanted = use.planned or self._formats()[use.kind]
        return wanted is not None and excluded.excluded(use.name, use.weight.name) is None

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        work, sites = _Work(model, context), []
        uses = [use for use in weight_uses(model) if context.covers(use.node)]
        if self.metric == "fisher":
            changing = [use.weight for use in uses if use.weight is not None and self._changes(use, context)]
            work.measure_fisher(changing)
        for done, use in enumerate(uses):
            context.progress(done, len(uses), use.name)
            sites.append(self._site(use, work))
        work.drop_unused()
        return Result.of(model, sites)

    def _site(self, use: Use, work: _Work) -> Site:
        facts = work.size(use)
        if use.reason or use.weight is None:
            return Site(use.name, Outcome.SKIPPED, use.reason, facts)
        context = dataclasses.replace(work.context, exclude=(*work.context.exclude, *self.exclude))
        pattern = context.excluded(use.name, use.weight.name)
        if pattern is not None:
            return Site(use.name, Outcome.SKIPPED, f"excluded by {pattern}", facts)
        wanted = use.planned or self._formats()[use.kind]
        if wanted is None:
            return Site(use.name, Outcome.SKIPPED, f"the recipe keeps the {use.kind.value} in float", facts)
        columns = use.weight.matrix[1]
        format = wanted if use.kind is Kind.CONVOLUTION else fitted(wanted, columns)
        if use.weight.format is not None:
            facts["format"] = str(use.weight.format)
            if use.weight.format == format:
                return Site(use.name, Outcome.MATCHED, "already in this format", facts)
            return Site(use.name, Outcome.SKIPPED, f"already quantized to {use.weight.format}", facts)
        if use.kind is Kind.CONVOLUTION and (wanted.native is None or wanted.group is not None or wanted.axis == "out"):
            reason = f"{wanted} is no format with one scale per output channel or one in all, which a convolution takes"
            return Site(use.name, Outcome.SKIPPED, reason, facts)
        if columns < SHORTEST_GROUP and use.kind is not Kind.CONVOLUTION:
            return Site(use.name, Outcome.SKIPPED, f"its rows of {columns} are shorter than any kernel's group", facts)
        try:
            format.streams(use.weight.matrix)
        except InputError as obstacle:
            return Site(use.name, Outcome.SKIPPED, str(obstacle), facts)
        if use.weight.value.dtype not in (None, ir.DataType.FLOAT):
            return Site(use.name, Outcome.SKIPPED, f"it computes in {use.weight.value.dtype.name}, not in FLOAT", facts)
        if format != wanted:
            facts["group"] = f"{format.group} instead of {wanted.group}: rows of {columns} would be padded"
        use.plan(None)
        request = None if self._statistic is None else use.statistic(self._statistic)
        return Site(use.name, Outcome.CHANGED, "", facts | work.quantize(use, format, request, self.sweeps))


def fitted(format: Format, columns: int) -> Format:
    """The format with its group halved while that makes rows smaller in kernels that pad rows to whole groups."""
    if format.group is None or format.axis != "in":
        return format
    extra = format.bits_per_group()

    def padded_bits(group: int) -> int:
        return -(-columns // group) * (group * format.values.bits + extra)

    groups = [format.group]
    while groups[-1] % 2 == 0 and groups[-1] // 2 >= SHORTEST_GROUP:
        groups.append(groups[-1] // 2)
    return dataclasses.replace(format, group=min(groups, key=padded_bits))


class _Work:
    """Quantizes weights in a graph, each once per format."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        self.context = context
        self._model = model
        self._done: dict[tuple[ir.Value, str], tuple[str, ir.Value, dict[str, object]]]
        self._done = context.memo.setdefault("done", {})
        self._seen: set[ir.Value] = context.memo.setdefault("seen", set())
        self._replaced: list[ir.Value] = []
        self._hessian: tuple[Request, Hessian] | None = None
        self._fisher: Mapping[ir.Value, ir.TensorProtocol] = {}

    def measure_fisher(self, weights: Sequence[Weight]) -> None:
        """Finds what each element of some weights counts."""
        context, batches = self.context, self.context.calibration
        if batches is None:
            batches = list(find_inputs(self._model, Session(self._model).run, context.seed, SYNTHETIC_SIZES).batches)
        self._fisher = fisher(self._model, weights, batches, context.seed, context.threads)

    def size(self, use: Use) -> dict[str, object]:
        """Elements and bytes of a weight, before and after if it stays as it is; zero where an earlier site counts it.

        So the sums over all sites are the sizes of all weights before and after the pass.
        """
        if use.weight is None:
            return {}
        seen = use.weight.data in self._seen
        self._seen.add(use.weight.data)
        size = 0 if seen else use.weight.stored_bytes
        return {"elements": 0 if seen else math.prod(use.weight.shape), "bytes_before": size, "bytes_after": size}

    def quantize(self, use: Use, format: Format, request: Request | None, sweeps: int) -> dict[str, object]:
        """Makes the consumer read the quantized weight; returns facts for the report.

        Args:
            use: The consumer.
            format: What the weight becomes.
            request: The statistic of its input that tells which errors matter; none if it was not collected.
            sweeps: An option of the assignment with a matrix of second moments.
        """
        assert use.weight is not None
        key = (use.weight.data, str(format))
        if key in self._done:
            first, decoded, facts = self._done[key]
            self._rewire(use, decoded)
            return facts | {"shared_with": first, "bytes_after": 0}
        numbers = use.weight.raw().reshape(use.weight.matrix)
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(np.sum(numbers, dtype=np.float64))
        if not finite:
            raise InputError(
                f"Expected finite weights, found NaN or infinity in {use.weight.name!r} ({use.name}). Check the "
                "checkpoint, copy it again, or leave this weight in float with --exclude."
            )
        tensor, found = self._assign(numbers, format, request, use.weight, sweeps)
        sqnr = sqnr_db(numbers, tensor, threads=self.context.threads)
        del numbers  # a view of the file
        use.weight.release()
        graph, name = self._model.graph, use.weight.name
        if any(data is use.weight.data for data, _ in self._done):
            name = f"{name}.{format}"
        node = emit(tensor, ir.Value(name=name, shape=ir.Shape(use.weight.shape)), self.context.store)
        for value in node.inputs:
            if value is not None:
                graph.register_initializer(value)
        node.metadata_props.update(use.node.metadata_props)
        graph.insert_before(use.node, node)
        require_opset(self._model, format)
        facts: dict[str, object] = {
            "format": str(format),
            "bits_per_weight": tensor.bits_per_weight,
            "sqnr_db": round(sqnr, 3) if math.isfinite(sqnr) else None,
            "bytes_after": tensor.stored_bits // 8,
        } | found
        self._done[key] = (use.name, node.outputs[0], facts)
        if self.context.block is not None:
            self.context.block.originals[node.outputs[0]] = use.weight
        self._rewire(use, node.outputs[0])
        return facts

    def _assign(
        self, numbers: np.ndarray, format: Format, request: Request | None, weight: Weight, sweeps: int
    ) -> tuple[QuantizedTensor, dict[str, object]]:
        """Chooses the codes of a weight, and says how that went."""
        threads, name = self.context.threads, weight.name
        if weight.value in self._fisher:
            information = self._fisher[weight.value]
            tensor = assign(numbers, format, information.numpy(), name=name, threads=threads)
            release(information)
            return tensor, {}
        statistic = None if request is None else self.context.statistics.get(request)
        if request is None or statistic is None or request.statistic is not Statistic.GRAM:
            return assign(numbers, format, statistic, name=name, threads=threads), {}
        if self._hessian is None or self._hessian[0] != request:
            self._hessian = None  # two at a time would be the peak of memory
            self._hessian = request, Hessian(statistic)
        hessian = self._hessian[1]
        tensor = gptq(numbers, format, hessian, sweeps=sweeps, name=name, threads=threads)
        sqnr = output_sqnr_db(numbers, tensor, statistic)
        return tensor, {"output_sqnr_db": round(sqnr, 3) if math.isfinite(sqnr) else None} | hessian.remarks()

    def _rewire(self, use: Use, decoded: ir.Value) -> None:
        assert use.weight is not None
        self._replaced.append(use.weight.value)
        use.node.replace_input_with(use.slot, decoded)

    def drop_unused(self) -> None:
        """Removes float weights, and the nodes that decoded them, that nothing reads any more."""
        for value in self._replaced:
            node = value.producer()
            if value.uses() or value.is_graph_output() or (node is not None and node.graph is None):
                continue
            data = value
            if node is not None:
                weight = read_weight(value)
                assert weight is not None
                data = weight.data
                self._model.graph.remove(node, safe=True)
            if not data.uses() and not data.is_graph_output() and data.name is not None:
                self._model.graph.initializers.pop(data.name, None)

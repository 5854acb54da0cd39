"""The C files of a library: a header, and one source with the runtime, the planned buffers and the calls in order."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from qc.backends.decoding import context_limit
from qc.backends.tvm.host import template
from qc.backends.tvm.isa import Isa
from qc.backends.tvm.lower import Lowering
from qc.backends.tvm.program import Buffer, Tensor
from qc.backends.tvm.shapes import Dim
from qc.ir.model import Model, Port

__all__ = ["Sources", "Writer", "feeds_text", "in_cache", "sources", "written"]

DEFAULT_CONTEXT = 2048
"""Tokens that an instance holds unless told otherwise: as many as the model was made for, but no more than these."""

DEFAULT_PROMPT = 512
"""Tokens of a text that are computed at once unless told otherwise; longer prompts are fed in parts."""

_DEFAULT_SIZE = 16
"""Default limit of a dimension that nothing is known about."""

_ALL_LOGITS = "  const int64_t qc_skip = 0; /* all logits */\n  (void)qc_skip;"
"""What tells sizes of memory, and checks of sizes, that no logits are left out."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """The generated C files.

    Attributes:
        header: ``model.h``; it knows `model_id` too.
        source: ``model.c``, without the hash of the weights, which is known later: `with_hash`.
        model_id: What tells that a weights file belongs to this library.
    """

    header: str
    source: str
    model_id: int

    def with_hash(self, value: int) -> str:
        """The source for a weights file of that hash."""
        return self.source.replace("@HASH@", f"0x{value:016x}u")


def sources(model: Model, lowering: Lowering) -> Sources:
    """Writes the C files of a lowered program."""
    return written(Writer(model, lowering))


def written(writer: Writer, model_id: int | None = None) -> Sources:
    """The C files of a writer, with what identifies the model: a number that is given, or made of them."""
    text = writer.source()
    if model_id is None:
        model_id = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    spelled = f"0x{model_id:016x}u"
    return Sources(writer.header().replace("@ID@", spelled), text.replace("@ID@", spelled), model_id)


def feeds_text(model: Model, lowering: Lowering) -> bool:
    """Whether the library generates text itself.

    It does where it keeps every cache, knows how to make every other input, and has nothing but logits to yield.
    """
    known = {"tokens", "mask", "positions", "past_key", "past_value"}
    ports = model.signature.inputs
    logits = model.signature.output("logits")
    return (
        bool(lowering.cached)
        and all(p.role in known for p in ports)
        and all(p.dtype == ir.DataType.INT64 and len(p.shape) == 2 for p in ports if not p.role.startswith("past_"))
        and all(v in lowering.cached for v in model.graph.inputs if _role(v).startswith("past_"))
        and all(in_cache(t) or _role(v) == "logits" for v, t in zip(model.graph.outputs, lowering.outputs, strict=True))
        and logits is not None
        and len(logits.shape) == 3
        and isinstance(logits.shape[-1], int)
    )


def _wide(size: Dim) -> str:
    """A size in floating point, in C."""
    return re.sub(r"\bqc_(\w+)\(", r"wide_\1(", size.c)


def _role(value: ir.Value) -> str:
    return value.metadata_props.get("qc.role", "other").partition(".")[0]


class Writer:
    """Writes the C files of a lowered program.

    Attributes:
        arrays: The caller's arrays as parameters of a run, by name.
    """

    arrays: Mapping[str, str] = {"inputs": "const void *const *inputs, ", "outputs": "void *const *outputs, "}

    def __init__(self, model: Model, lowering: Lowering) -> None:
        self.model, self.lowering, self.program = model, lowering, lowering.program
        self.decoder = feeds_text(model, lowering)
        self.names = list(self.program.dims.values())

    def header(self) -> str:
        """``model.h``."""
        dims = [f"QC_DIM_{n.removeprefix('d_').upper()} = {i}" for i, n in enumerate(self.names)]
        dims.append(f"QC_DIMENSIONS = {len(self.names)}")
        lines = ["/* Sizes that are known when the library runs. */", f"enum {{ {', '.join(dims)} }};"]
        ports = []
        for word, held in (("input", self.model.signature.inputs), ("output", self.model.signature.outputs)):
            ports += [_comment(f"{word} {i}: {_spell(p)}") for i, p in enumerate(held)]
        text = template("model.h").replace("@DIMENSIONS@", "\n".join(lines)).replace("@PORTS@", "\n".join(ports))
        text, decoder = text.replace("@CACHES@", template("caches.h") if self.lowering.cached else ""), ""
        if self.decoder:
            logits = self.model.signature.output("logits")
            assert logits is not None
            decoder = f"enum {{ QC_VOCABULARY = {logits.shape[-1]} }};\n{template('decoder.h')}"
        return text.replace("@DECODER@", decoder)

    def constants(self) -> list[str]:
        """The sizes of everything."""
        signature = self.model.signature
        logits = signature.output("logits")
        constants = {
            "BUFFERS": len(self.program.arena),
            "CACHES": len(self.program.caches),
            "INPUTS": len(signature.inputs),
            "OUTPUTS": len(signature.outputs),
            "VOCABULARY": logits.shape[-1] if self.decoder and logits is not None else 0,
            "WHOLE_LOGITS": self._whole_logits() if self.decoder else 0,
        }
        lines = [f"enum {{ {', '.join(f'{k} = {v}' for k, v in constants.items())} }};"]
        lines.append(f"#define WEIGHT_BYTES ((uint64_t){self.program.weight_bytes}u)")
        return [*lines, "#define MODEL_ID @ID@", "#define WEIGHT_HASH @HASH@"]

    def _whole_logits(self) -> int:
        """The number of the dimension of new tokens, from 1, if logits are computed for all of them; else 0.

        They are where bytes are multiplied, or where more is computed of them than `behind_head` knows.
        """
        number = next(i for i, p in enumerate(self.model.signature.outputs) if p.role == "logits")
        writers = [s for s in self.program.statements if ("output", number) in {(b.kind, b.index) for b in s.writes}]
        if any("qc_skip" in s.text for s in writers):
            return 0
        tokens = next(self.lowering.get(v) for v in self.model.graph.inputs if _role(v) == "tokens")
        step = tokens.shape[-1].c
        return self.names.index(step) + 1 if step in self.names else 0

    def source(self) -> str:
        """``model.c``."""
        lines = [*self.constants(), self._cpu()]
        none = "static int tiles_allowed(void) { return 0; }"
        lines.append(template("tiles.c") if self.program.isa.tiles else none)
        return self.filled("runtime.c", "caches.c", lines)

    def filled(self, runtime: str, caches: str, constants: Sequence[str]) -> str:
        """The source: what differs, in what all libraries share."""
        text = template(runtime).replace("@CONSTANTS@", "\n".join(constants))
        for name in ("weights", "instances", "run"):
            text = text.replace(f"@{name.upper()}@", template(f"{name}.c"))
        text = text.replace("@GENERATED@", "\n\n".join(self.generated()))
        text = text.replace("@CACHES@", template(caches) if self.lowering.cached else "")
        return text.replace("@DECODER@", template("decoder.c") if self.decoder else "")

    def _cpu(self) -> str:
        """The check that the processor has the instructions of the level."""
        isa = self.program.isa
        if isa.arch == "x86_64":
            names = (f.replace("_vnni", "vnni").replace("sse4_2", "sse4.2") for f in isa.flags)
            tests = " && ".join(f'__builtin_cpu_supports("{n}")' for n in names if n != "f16c")
            return f"static int cpu_fits(void) {{ __builtin_cpu_init(); return {tests}; }}"
        bits = {"asimddp": "1UL << 20", "asimdhp": "1UL << 10", "asimd": "1UL << 1"}
        tests = [f"(getauxval(16) & ({bits[f]})) != 0" for f in isa.flags if f in bits]
        if "i8mm" in isa.flags:
            tests.append("(getauxval(26) & (1UL << 13)) != 0")
        return (
            "#if defined(__linux__)\n#include <sys/auxv.h>\n"
            f"static int cpu_fits(void) {{ return {' && '.join(tests)}; }}\n"
            f"#elif defined(__APPLE__)\n{_apple_fits(isa)}\n"
            "#else\nstatic int cpu_fits(void) { return 1; }\n#endif"
        )

    def generated(self) -> Iterable[str]:
        """What differs between models."""
        yield "\n".join(self.kernels())
        yield from self.program.functions.values()
        yield self._lifetimes()
        yield self.sizes("buffer_sizes", "int64_t *size", self.program.arena)
        yield self._fit()
        yield self._caches()
        yield self._ports()
        yield self._defaults()
        yield self._run()
        if self.decoder:
            yield self._feeding()

    def kernels(self) -> Iterable[str]:
        """How each kernel is called."""
        for name, (_, _, pointers, integers) in sorted(self.program.kernels.items()):
            types = ", ".join(["void *"] * pointers + ["int32_t"] * (integers + 2))
            arguments = [f"(void *)(uintptr_t)t->p[{i}]" for i in range(pointers)]
            arguments += [f"t->i[{i}]" for i in range(integers)]
            yield f"extern void {name}({types});"
            yield (
                f"static void run_{name}(const task *t, int32_t begin, int32_t end) {{\n"
                f"  {name}({', '.join([*arguments, 'begin', 'end'])});\n}}"
            )

    def _lifetimes(self) -> str:
        first, last = {}, {}
        for number, statement in enumerate(self.program.statements):
            for buffer in (*statement.reads, *statement.writes):
                if buffer.kind == "arena":
                    first.setdefault(buffer.index, number)
                    last[buffer.index] = number
        count = len(self.program.arena)
        rows = []
        for name, held in (("first", first), ("last", last)):
            numbers = ", ".join(str(held.get(i, 0)) for i in range(count)) or "0"
            rows.append(f"static const int32_t buffer_{name}[] = {{{numbers}}};")
        return "\n".join(rows)

    def _locals(self, used: str) -> str:
        lines = [
            f"  const int64_t {n} = dims[{i}];"
            for i, n in enumerate(self.names)
            if re.search(rf"\b{n}\b", used) is not None
        ]
        return "\n".join([*lines, "  (void)dims;"])

    def sizes(self, name: str, result: str, buffers: Sequence[Buffer]) -> str:
        """A function that yields the bytes of buffers."""
        body = "\n".join(f"  size[{i}] = {b.bytes.c};" for i, b in enumerate(buffers))
        return (
            f"static void {name}(const int64_t *dims, {result}) {{\n{self._locals(body)}\n{_ALL_LOGITS}\n"
            f"  (void)size;\n{body}\n}}"
        )

    def _fit(self) -> str:
        """Whether buffers and arrays have sizes that kernels count to, in floating point: integers would overflow."""
        cached, inputs = self.lowering.cached, [self.lowering.get(v) for v in self.model.graph.inputs]
        held = [b.bytes for b in self.program.arena]
        if cached:
            batch, room = self._cache_limits()
            held += [batch * room * t.shape[1] * t.shape[3] * self.program.bytes_of(t.dtype) for t in cached.values()]
        arrays = [t.elements for t in (*inputs, *self.lowering.outputs) if not in_cache(t)]
        tests = [
            " && ".join(
                [f"{_wide(size)} <= INT32_MAX" for size in dict.fromkeys(sizes) if size.constant is None] or "1"
            )
            for sizes in (held, arrays)
        ]
        body = f"  return {tests[0]} && (!arrays || ({tests[1]}));"
        names = self._locals(body).replace("const int64_t d_", "const double d_")
        return f"static int sizes_fit(const int64_t *dims, int arrays) {{\n{names}\n{_ALL_LOGITS}\n{body}\n}}"

    def _caches(self) -> str:
        cached = self.lowering.cached
        lines = ["static int cache_sizes(qc_instance *q, const int64_t *dims, int64_t *size) {"]
        if not cached:
            return "\n".join([*lines, "  (void)q; (void)dims; (void)size;\n  return QC_OK;\n}", self._check_dims()])
        heads = ", ".join(t.shape[1].c for t in cached.values())
        rows = [t.shape[3] * self.program.bytes_of(t.dtype) for t in cached.values()]
        lines = [
            f"static const int64_t cache_heads[] = {{{heads}}};",
            f"static const int64_t cache_row[] = {{{', '.join(r.c for r in rows)}}}; /* bytes */",
            *lines,
        ]
        batch, room = self._cache_limits()
        body = "\n".join(
            f"  size[{i}] = qc_batch * qc_room * {(t.shape[1] * row).c};"
            for i, (t, row) in enumerate(zip(cached.values(), rows, strict=True))
        )
        used = f"{batch.c} {room.c}"
        lines += [
            self._locals(used),
            f"  const int64_t qc_batch = {batch.c}, qc_room = {room.c};",
            "  q->batch = qc_batch;\n  q->room = qc_room;",
            f"{body}\n  return qc_batch > 0 && qc_room > 0 ? QC_OK : QC_E_ARGUMENT;\n}}",
            self._check_dims(),
        ]
        return "\n".join(lines)

    def _cache_limits(self) -> tuple[Dim, Dim]:
        """The batch and the number of tokens that the caches hold, of the limits."""
        tensors = {_role(v): self.lowering.get(v) for v in self.model.graph.inputs}
        past = next(t for v, t in ((v, self.lowering.get(v)) for v in self.lowering.cached))
        mask = tensors.get("mask")
        return past.shape[0], mask.shape[-1] if mask is not None else past.shape[2]

    def _check_dims(self) -> str:
        """Sizes must fit together, and new tokens behind those in the caches."""
        lines = ["static int check_dims(const qc_instance *q, const int64_t *dims) {"]
        conditions = [f"  if (!({c})) return QC_E_ARGUMENT;" for c in self.program.conditions]
        tokens = next((v for v in self.model.graph.inputs if _role(v) == "tokens"), None)
        past = next(iter(self.lowering.cached), None)
        test = "0"
        if tokens is not None and past is not None:
            held, new = self.lowering.get(past).shape, self.lowering.get(tokens).shape
            test = f"{(held[2] + new[-1]).c} > q->room || {held[0].c} > q->batch"
        used = self._locals("\n".join([test, *conditions]))
        return "\n".join(
            [*lines, used, _ALL_LOGITS, "  (void)q;", *conditions, f"  return {test} ? QC_E_LIMIT : QC_OK;\n}}"]
        )

    def _ports(self) -> str:
        cached = self.lowering.cached
        inputs = ", ".join(str(int(v in cached)) for v in self.model.graph.inputs) or "0"
        outputs = ", ".join(str(int(in_cache(t))) for t in self.lowering.outputs) or "0"
        cases = []
        for i, tensor in enumerate(self.lowering.outputs):
            shape = tensor.shape
            if in_cache(tensor):
                past = next(v for v, t in cached.items() if t.buffer is tensor.buffer)
                tokens = next(v for v in self.model.graph.inputs if _role(v) == "tokens")
                held, new = self.lowering.get(past).shape, self.lowering.get(tokens).shape
                shape = (held[0], held[1], held[2] + new[-1], held[3])
            body = " ".join(f"shape[{a}] = {d.c};" for a, d in enumerate(shape))
            cases.append(f"    case {i}: {body} return {len(shape)};")
        body = "\n".join(cases)
        return (
            f"static const char input_is_cache[] = {{{inputs}}};\n"
            f"static const char output_is_cache[] = {{{outputs}}};\n"
            "/* For tools: the shape of an output; returns its rank. */\n"
            "int qc_output_shape(int index, const int64_t *dims, int64_t *shape);\n"
            "int qc_output_shape(int index, const int64_t *dims, int64_t *shape) {\n"
            f"{self._locals(body)}\n{_ALL_LOGITS}\n  (void)shape;\n"
            f"  switch (index) {{\n{body}\n    default: return -1;\n  }}\n}}"
        )

    def _defaults(self) -> str:
        context = min(context_limit(self.model.provenance) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        limits = dict.fromkeys(self.names, _DEFAULT_SIZE)
        for value in self.model.graph.inputs:
            role, shape = _role(value), self.lowering.get(value).shape
            for axis, size in enumerate(shape):
                if len(size.terms) == 1 and size.constant is None:
                    limits[size.c] = _default(role, axis, len(shape), context, bool(self.lowering.cached))
        numbers = ", ".join(str(limits[n]) for n in self.names) or "0"
        return f"const int64_t qc_default_limits[QC_DIMENSIONS > 0 ? QC_DIMENSIONS : 1] = {{{numbers}}};"

    def _run(self) -> str:
        lines = []
        label = ""
        for number, statement in enumerate(self.program.statements):
            if statement.label != label:
                label = statement.label
                lines.append(f"  {_comment(f'{number}: {label}')}")
            lines.append(f"  {statement.text}")
        body = "\n".join(lines)
        extra = []
        if re.search(r"\bqc_room\b", body) or re.search(r"\bqc_batch\b", body):
            extra.append("  const int64_t qc_room = q->room, qc_batch = q->batch;\n  (void)qc_room; (void)qc_batch;")
        arrays = "".join(self.arrays.values())
        unused = " ".join(f"(void){n};" for n in ("q", *self.arrays, "qc_skip", "launch"))
        return (
            f"static int run(qc_instance *q, const int64_t *dims, {arrays}int64_t qc_skip) {{\n{self._locals(body)}\n"
            + "\n".join(extra)
            + f"\n  {unused}\n{body}\n  return QC_OK;\n}}"
        )

    def _feeding(self) -> str:
        """How a text becomes dimensions and inputs."""
        values: dict[str, str] = {}
        inputs = []
        roles = {"tokens": ("1", "count"), "positions": ("1", "count"), "mask": ("1", "past + count")}
        for i, value in enumerate(self.model.graph.inputs):
            role, shape = _role(value), self.lowering.get(value).shape
            sizes = roles.get(role, ("1", None, "past", None))
            values.update({d.c: s for d, s in zip(shape, sizes, strict=True) if s is not None and d.constant is None})
            source = {"tokens": "tokens", "mask": "q->ones", "positions": "q->running + q->past"}.get(role)
            if source is not None:
                inputs.append(f"  inputs[{i}] = {source};")
        sets = "\n".join(f"  dims[{i}] = {values.get(n, '1')};" for i, n in enumerate(self.names))
        number = next(i for i, p in enumerate(self.model.signature.outputs) if p.role == "logits")
        step = next((i for i, n in enumerate(self.names) if values.get(n) == "count"), None)
        limit = f"q->limits[{step}]" if step is not None else "1"
        return (
            f"enum {{ LOGITS = {number} }};\n"
            f"static void set_dims(int64_t *dims, int64_t count, int64_t past) {{\n  (void)past;\n{sets}\n}}\n"
            f"static int64_t most_at_once(const qc_instance *q) {{ return {limit}; }}\n"
            "static void fill_inputs(const qc_instance *q, const void **inputs, const int64_t *tokens) {\n"
            "  (void)q;\n" + "\n".join(inputs) + "\n}"
        )


def _apple_fits(isa: Isa) -> str:
    """The same check on iOS, whose kernel has names for what its processors have."""
    names = {"asimddp": "FEAT_DotProd", "asimdhp": "FEAT_FP16", "i8mm": "FEAT_I8MM"}
    tests = [f'has("hw.optional.arm.{names[f]}")' for f in isa.flags if f in names]
    if not tests:
        return "static int cpu_fits(void) { return 1; }"
    return (
        "#include <sys/sysctl.h>\n"
        "static int has(const char *name) {\n  int found = 0;\n  size_t size = sizeof found;\n"
        "  return sysctlbyname(name, &found, &size, NULL, 0) == 0 && found != 0;\n}\n"
        f"static int cpu_fits(void) {{ return {' && '.join(tests)}; }}"
    )


def in_cache(tensor: Tensor) -> bool:
    """Whether a tensor lies in a cache that the library keeps."""
    return tensor.buffer is not None and tensor.buffer.kind == "cache"


def _default(role: str, axis: int, rank: int, context: int, cached: bool) -> int:
    """The default limit of an axis of an input. An image of three axes has as many elements as one of two."""
    if axis == 0:
        return 1 if cached else _DEFAULT_SIZE
    if role == "mask" and cached:
        return context
    if role in ("past_key", "past_value"):
        return context
    if role in ("tokens", "positions", "mask", "token_types", "decoder_tokens", "decoder_mask"):
        return min(context, DEFAULT_PROMPT)
    return 40 if rank > 4 else 256


def _comment(text: str) -> str:
    """A comment in C, which no name in it begins, ends or continues on another line."""
    text = " ".join(text.replace("*/", "* /").replace("/*", "/ *").split())
    return f"/* {text} */"


def _spell(port: Port) -> str:
    dims = ", ".join("?" if d is None else str(d) for d in port.shape)
    role = "" if port.role == "other" else f", {port.role}" + ("" if port.index is None else f" {port.index}")
    return f"{port.name}: {port.dtype.name.lower()} [{dims}]{role}"

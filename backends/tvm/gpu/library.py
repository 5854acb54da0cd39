"""The C files of a library whose kernels run on a GPU, and its launch table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from qc.backends.tvm.gpu.build import Built
from qc.backends.tvm.gpu.languages import Language
from qc.backends.tvm.gpu.program import GpuProgram
from qc.backends.tvm.host import template
from qc.backends.tvm.library import Writer, in_cache
from qc.backends.tvm.lower import Lowering
from qc.backends.tvm.program import Buffer, Tensor
from qc.backends.tvm.shapes import dim
from qc.ir.model import Model

__all__ = ["GpuWriter", "launch_table"]

_BYTES = 32
_KINDS = {ir.DataType.FLOAT: "f", ir.DataType.INT64: "l", ir.DataType.INT32: "i", ir.DataType.INT8: "s"}


class GpuWriter(Writer):
    """Writes the C files of launches.

    Attributes:
        language: Of the kernels.
    """

    program: GpuProgram
    arrays: Mapping[str, str] = {}

    def __init__(
        self, model: Model, lowering: Lowering, built: Mapping[str, Built], language: Language, image: bytes = b""
    ) -> None:
        """Prepares to write.

        Args:
            model: The model.
            lowering: Its launches.
            built: The kernels.
            language: Theirs.
            image: All of them, compiled; else the library compiles their sources.
        """
        super().__init__(model, lowering)
        self._built, self.language, self._image = built, language, image

    def source(self) -> str:
        """``model.c``."""
        lines = [*self.constants(), f"enum {{ KERNELS = {len(self._built)}, WEIGHTS = {len(self.program.blobs)} }};"]
        if self._image:
            rows = (self._image[i : i + _BYTES] for i in range(0, len(self._image), _BYTES))
            numbers = "\n".join("  " + "".join(f"{b}," for b in row) for row in rows)
            lines.append(f"static const unsigned char kernel_image[] __attribute__((aligned(16))) = {{\n{numbers}\n}};")
        return self.filled("gpu.c", "gpu_caches.c", lines).replace("@DEVICE@", template(self.language.host))

    def kernels(self) -> Iterable[str]:
        """Sources, grids and facts of the kernels; weights; sizes and types of inputs and outputs."""
        numbers = ", ".join(f"K_{name} = {i}" for i, name in enumerate(self._built))
        yield f"enum {{ {numbers} }};"
        rows = []
        for name, kernel in self._built.items():
            used = [p for p in kernel.declared if any(p in _words(g) for g in kernel.grid)]
            buffers = kernel.declared[: kernel.buffers_declared]
            integers = kernel.declared[kernel.buffers_declared :]
            held = "".join(f"  const int64_t {p} = given[{integers.index(p)}];\n" for p in used)
            sizes = "".join(f"  blocks[{i}] = {g};\n" for i, g in enumerate(kernel.grid))
            yield f"static void grid_{name}(const int32_t *given, int64_t *blocks) {{\n  (void)given;\n{held}{sizes}}}"
            if not self._image:
                yield f"static const char source_{name}[] =\n{_literal(kernel.source)};"
            arguments = [buffers.index(p) for p in kernel.parameters[: kernel.buffers]]
            arguments += [integers.index(p) for p in kernel.parameters[kernel.buffers :]]
            block = ", ".join(map(str, kernel.block))
            source = "NULL" if self._image else f"source_{name}"
            rows.append(
                f'  {{"{kernel.entry}", {source}, {kernel.buffers}, {len(arguments) - kernel.buffers}, '
                f"{{{', '.join(map(str, arguments))}}}, {{{block}}}, grid_{name}}},"
            )
        yield "static const kernel_facts kernels[] = {\n" + "\n".join(rows) + "\n};"
        blobs = self.program.blobs
        yield f"static const int64_t weight_offset[] = {{{', '.join(str(b.offset) for b in blobs) or '0'}}};"
        yield f"static const int64_t weight_size[] = {{{', '.join(str(b.bytes) for b in blobs) or '0'}}};"
        inputs = [self.lowering.get(v) for v in self.model.graph.inputs]
        yield self.sizes("input_sizes", "int64_t *size", [t.buffer for t in inputs if t.buffer is not None])
        outputs = [Buffer("output", i, dim(0) if in_cache(t) else t.elements * 4)
                   for i, t in enumerate(self.lowering.outputs)]  # fmt: skip
        yield self.sizes("output_sizes", "int64_t *size", outputs)
        for word, ports in (("input", self.model.signature.inputs), ("output", self.model.signature.outputs)):
            kinds = "".join(_KINDS.get(p.dtype, "b") for p in ports)
            yield f'static const char {word}_kind[] = "{kinds}";'


def launch_table(
    program: GpuProgram, lowering: Lowering, model: Model, built: Mapping[str, Built], language: Language
) -> dict[str, Any]:
    """What a program must know to run the kernels by itself: `launches`, and what they refer to."""
    sizes = {v: lowering.get(v) for v in model.graph.inputs}
    outputs = (model.graph.outputs, lowering.outputs)
    return {
        "language": language.name,
        "dimensions": dict(program.dims),
        "kernels": {
            name: {
                "file": f"kernels/{name}.{language.suffix}",
                "entry": kernel.entry,
                "buffers": list(kernel.parameters[: kernel.buffers]),
                "integers": list(kernel.parameters[kernel.buffers :]),
                "grid": list(kernel.grid),
                "block": list(kernel.block),
            }
            for name, kernel in built.items()
        },
        "inputs": [_port(v, t, v in lowering.cached) for v, t in sizes.items()],
        "outputs": [_port(v, t, in_cache(t)) for v, t in zip(*outputs, strict=True)],
        "arena": [b.bytes.c for b in program.arena],
        "caches": [b.bytes.c for b in program.caches],
        "weights": [{"offset": b.offset, "bytes": b.bytes} for b in program.blobs],
        "launches": [_named(entry, built[entry["kernel"]]) for entry in program.table()],
    }


def _port(value: ir.Value, tensor: Tensor, cache: bool) -> dict[str, Any]:
    """An input or output; one that is a cache stays on the device."""
    return {"name": value.name, "type": tensor.dtype.name, "bytes": (tensor.elements * 4).c, "cache": cache}


def _named(entry: Mapping[str, Any], kernel: Built) -> dict[str, Any]:
    """A launch with its buffers and integers by the names of the kernel's parameters, in their order."""
    declared = dict(zip(kernel.declared, [*entry["buffers"], *entry["integers"]], strict=True))
    buffers = [declared[p] for p in kernel.parameters[: kernel.buffers]]
    used = {p for p in declared if any(p in _words(g) for g in kernel.grid)}
    integers = {p: declared[p] for p in declared if p in kernel.parameters[kernel.buffers :] or p in used}
    return {**entry, "buffers": buffers, "integers": integers}


def _words(expression: str) -> set[str]:
    """The names in a C expression."""
    return set(re.findall(r"[A-Za-z_]\w*", expression))


def _literal(text: str) -> str:
    """C string literals, none longer than compilers must take at once."""
    return "\n".join(f"    {json.dumps(line + chr(10), ensure_ascii=False)}" for line in text.splitlines())

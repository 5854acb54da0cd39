"""From a kernel to source text in the language of a GPU, with what its launch must know."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qc.backends.tvm.gpu.languages import OPENCL, Language
from qc.backends.tvm.toolchain import PAIR, cache_directory, check_versions, digest_of, write_whole
from qc.ir.errors import InternalError

__all__ = ["Built", "build_kernels"]

_AXES = ("x", "y", "z")


@dataclasses.dataclass(frozen=True)
class Built:
    """A kernel in the language of a GPU.

    Attributes:
        entry: The name of its function.
        source: The text.
        parameters: Names of its parameters in order, of buffers and then of integers.
        buffers: How many of them are buffers.
        grid: Number of blocks along each axis: C expressions of the integers' names.
        block: Threads of a block along each axis.
        declared: Names of what a launch passes, in the order of the generator: buffers, then integers.
        buffers_declared: How many of these are buffers.
    """

    entry: str
    source: str
    parameters: tuple[str, ...]
    buffers: int
    grid: tuple[str, str, str]
    block: tuple[int, int, int]
    declared: tuple[str, ...]
    buffers_declared: int


def build_kernels(kernels: Mapping[str, tuple[Any, tuple[Any, ...]]], language: Language) -> dict[str, Built]:
    """Generates kernels; those generated before come from the cache.

    Args:
        kernels: By name: a generator and its arguments; ``generator(name, *arguments)`` yields the function. One
            without threads is a product, which dlight schedules.
        language: Of the result.
    """
    check_versions()
    root, found = Path(__file__).parent, {}
    sources = digest_of([*root.glob("*.py"), *(root.parent / f"kernels/{n}.py" for n in ("caches", "vectors"))])
    for name, (generator, arguments) in sorted(kernels.items()):
        key = f"{sources}\n{PAIR}\n{language}\n{name}\n{generator.__qualname__}{arguments}"
        kept = cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if not kept.is_file():
            built = _build(generator(name, *arguments), name, language)
            write_whole(kept, json.dumps(dataclasses.asdict(built)).encode())
        data = json.loads(kept.read_text("utf-8"))
        found[name] = Built(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
    return found


def _build(function: Any, name: str, language: Language) -> Built:
    import tvm
    from tvm import tirx
    from tvm.target import Target
    from tvm.tirx import compilation_pipeline
    from tvm.tirx.build import split_host_device_mods

    target = {"kind": language.name, **language.options}
    names = {str(p.name): isinstance(p.ty, tvm.ir.PrimType) for p in function.params}
    held, integers = ([n for n, number in names.items() if number == wanted] for wanted in (False, True))
    module = tvm.IRModule({name: function})
    if not _extents(function.body):
        module = _scheduled(module, name)
    module = tirx.transform.BindTarget(Target(target, host={"kind": "llvm"}))(module)
    lower, _, finish = compilation_pipeline.get_tir_pipeline("s_tir")
    # It would make parameters of their own of sizes of a launch that are computed from several integers.
    with tvm.transform.PassContext(disabled_pass=["tirx.CommonSubexprElim"]):
        _, devices = split_host_device_mods(lower(module))
    (kind, device), = devices.items()  # fmt: skip
    device = finish()(device)
    (kernel,) = device.functions.values()
    source = _exact(tvm.get_global_func(f"target.build.{language.name}")(device, kind).inspect_source(), device)
    for theirs, ours in language.spelled.items():
        source = re.sub(rf"\b{theirs}\b", ours, source)
    parameters = [str(p.name) for p in kernel.params]
    pointers = [p.removesuffix("_ptr") for p in parameters if p.endswith("_ptr")]
    if any(p.endswith("_ptr") for p in parameters[len(pointers) :]):
        raise InternalError(f"the kernel {name} mixes buffers and integers in its parameters: {parameters}.")
    extents = _extents(kernel.body)
    sizes = sorted(set(parameters[len(pointers) :]) - set(integers))  # of operands of a product
    return Built(
        str(kernel.attrs["global_symbol"]),
        source,
        (*pointers, *parameters[len(pointers) :]),
        len(pointers),
        tuple(_c(extents[f"blockIdx.{a}"]) if f"blockIdx.{a}" in extents else "1" for a in _AXES),  # type: ignore[arg-type]
        tuple(int(extents.get(f"threadIdx.{a}", 1)) for a in _AXES),  # type: ignore[arg-type]
        (*held, *integers, *sizes),
        len(held),
    )


def _exact(source: str, device: Any) -> str:
    """The source with ten digits of each number; TVM prints seven.

    Nine tell all floats apart, but round the largest of them up, to a number that WGSL refuses as too large.
    """
    import tvm

    nodes = json.loads(tvm.ir.save_json(device))["nodes"]
    numbers = [abs(node["data"]["value"]) for node in nodes if node["type"] == "ir.FloatImm"]
    digits = {f"{number:.6e}": f"{number:.9e}" for number in numbers}
    return re.sub(r"\d\.\d{6}e[+-]\d+", lambda found: digits.get(found[0], found[0]), source)


def _scheduled(module: Any, name: str) -> Any:
    """Schedules a product by the rules that are made for products, and by no other.

    The schedule is the one for OpenCL whatever the language is, so that what runs on one device is what all get.
    """
    from tvm.s_tir import dlight
    from tvm.target import Target

    with Target({"kind": OPENCL.name, **OPENCL.options}):
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Matmul(), dlight.gpu.GEMV())(module)
    if "tirx.is_scheduled" not in module[name].attrs:
        raise InternalError(f"dlight has no schedule for the product {name}.")
    return module


def _extents(body: Any) -> dict[str, Any]:
    """How many blocks and threads there are along each axis."""
    from tvm import tirx

    found: dict[str, Any] = {}
    left = [body]
    while left:
        node = left.pop()
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            found[str(node.node.thread_tag)] = node.value
        inner = [getattr(node, field, None) for field in ("body", "block", "then_case", "else_case")]
        left += [n for n in (*inner, *getattr(node, "seq", ())) if isinstance(n, tirx.Stmt)]
    return found


def _c(value: Any) -> str:
    """A size as a C expression: sums, products, and functions of the library."""
    from tvm import tirx

    if isinstance(value, (int, tirx.IntImm)):
        return str(int(value))
    if isinstance(value, tirx.Var):
        return str(value.name)
    if isinstance(value, tirx.Cast):
        return _c(value.value)
    name, a, b = type(value).__name__, value.a, value.b
    signs = {"Add": "+", "Sub": "-", "Mul": "*"}
    if name in signs:
        return f"({_c(a)} {signs[name]} {_c(b)})"
    functions = {"FloorDiv": "qc_div", "Div": "qc_div", "Max": "qc_max", "Min": "qc_min"}
    if name == "RShift":
        return f"qc_div({_c(a)}, {1 << int(b)})"
    if name not in functions:
        raise InternalError(f"a launch has a size that no host computes: {value}.")
    return f"{functions[name]}({_c(a)}, {_c(b)})"

"""``qc recipes``, ``passes``, ``targets``, ``formats`` and ``doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform

from qc.cli.output import print_json, print_table

__all__ = ["doctor", "formats", "passes", "recipes", "targets"]

_EXTRAS = {
    "torch": ("torch", "transformers"),
    "genai": ("onnxruntime-genai",),
    "npu": ("onnxruntime-qnn",),
    "tvm": ("apache-tvm",),
    "report": ("jinja2",),
    "allocate": ("scipy",),
}
_CORE = ("numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "networkx", "safetensors", "rich", "tokenizers")


def recipes(arguments: argparse.Namespace) -> int:
    """Lists the recipes with what they do."""
    from qc.passes.pipeline import format_pipeline, steps_of
    from qc.recipes import load_recipe, recipe_names

    rows = [load_recipe(name) for name in recipe_names()]
    data = [
        {"name": r.name, "about": r.about, "source": r.source, "passes": format_pipeline(steps_of(r.passes))}
        for r in rows
    ]
    return _show(arguments, "recipes", data, ("name", "about", "passes"))


def passes(arguments: argparse.Namespace) -> int:
    """Lists the passes with their options and defaults."""
    from qc.passes.pipeline import options_of, pass_class, pass_names

    data = []
    for name in pass_names():
        cls = pass_class(name)
        options = {k.replace("_", "-"): f.default for k, f in options_of(cls).items()}
        about = (cls.__doc__ or "").strip().splitlines()[0]
        data.append(
            {
                "name": name,
                "contract": type(cls.contract).__name__.lower(),
                "about": about,
                "options": {k: str(v) for k, v in options.items()},
            }
        )
    if arguments.json:
        print_json({"passes": data})
        return 0
    rows = ((p["name"], p["contract"], p["about"], " ".join(f"{k}={v}" for k, v in p["options"].items())) for p in data)
    print_table("", ("name", "contract", "about", "options"), rows)
    return 0


def targets(arguments: argparse.Namespace) -> int:
    """Lists the targets."""
    from qc.backends.target import backend_for, target_names

    found = [backend_for(name).target for name in target_names()]
    data = [
        {
            "name": t.name,
            "about": t.about,
            "runtime": " >= ".join(t.runtime),
            "recipe": t.recipe,
            "formats": ", ".join(t.formats),
        }
        for t in found
    ]
    return _show(arguments, "targets", data, ("name", "about", "runtime", "recipe", "formats"))


def formats(arguments: argparse.Namespace) -> int:
    """Lists the weight formats with the bits that they store per weight."""
    from qc.backends.ort.widen import runs_as
    from qc.ir.quant import STANDARD, named_formats

    data = []
    for name, format in named_formats().items():
        free = name not in STANDARD and format.values.scaled
        grouped = {g: dataclasses.replace(format, group=g) if free else format for g in (32, 128)}
        bits = {f"g{g}": f.stored_bits((4096, 4096)) / 4096**2 for g, f in grouped.items()}
        about = STANDARD.get(name, format.values.about)
        data.append({"name": name, "about": about, **bits, "ort_cpu": runs_as(grouped[128], 4096)})
    if arguments.json:
        print_json({"formats": data})
        return 0
    rows = ((d["name"], d["about"], f"{d['g32']:.3f}", f"{d['g128']:.3f}", d["ort_cpu"]) for d in data)
    print_table("", ("name", "about", "bits/weight :g32", ":g128", "on ort-cpu (:g128)"), rows, numeric=(2, 3))
    print(
        "\nA full spelling adds the grouping, the storage of scales and a remainder: uint4:g32, int8:g128:f16, int8:in,"
    )
    print("nf4:g64:q8x256, lut3+sparse0.45, mid1:g128:f16+columns10:int8. Without a group, a row has one scale.")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Says what is installed and what this machine's runtime can do."""
    data: dict[str, object] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "instructions": _instructions(),
        **{name: _version(name) or "missing" for name in ("qc-compiler", *_CORE)},
    }
    for extra, packages in _EXTRAS.items():
        found = [f"{p} {_version(p)}" for p in packages if _version(p)]
        complete = len(found) == len(packages)
        data[f"extra {extra}"] = ", ".join(found) if complete else f"not installed: pip install 'qc-compiler[{extra}]'"
    if arguments.json:
        print_json(data)
    else:
        print_table("", ("", ""), data.items())
    return 0


def _show(arguments: argparse.Namespace, key: str, data: list[dict], columns: tuple[str, ...]) -> int:
    if arguments.json:
        print_json({key: data})
    else:
        print_table("", columns, ((d[c] for c in columns) for d in data))
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instructions() -> str:
    """Vector extensions that matter for integer products, as Linux names them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            line = next((x for x in info if x.startswith(("flags", "Features"))), "")
    except OSError:
        return "unknown"
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
    return ", ".join(w for w in wanted if w in line.split()) or "none of the integer extensions"

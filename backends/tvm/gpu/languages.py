"""The languages of GPUs that TVM generates: one record each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["CUDA", "LANGUAGES", "METAL", "OPENCL", "WEBGPU", "Language"]


@dataclasses.dataclass(frozen=True)
class Language:
    """A language of GPU kernels.

    Attributes:
        name: What TVM calls it.
        about: Of the target, in a line.
        suffix: Of a file with a kernel.
        options: Of TVM's target.
        module: The module of JavaScript that launches them; empty where it is none.
        host: The C file that speaks to the driver; empty where none is generated.
        link: What the library of that host is linked with.
        header: What that file includes.
        package: What to install where its headers or libraries are missing.
        spelled: What it calls functions that TVM spells in another way, by TVM's names.
    """

    name: str
    about: str
    suffix: str
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)
    module: str = ""
    host: str = ""
    link: tuple[str, ...] = ()
    header: str = ""
    package: str = ""
    spelled: Mapping[str, str] = dataclasses.field(default_factory=dict)


OPENCL = Language(
    "opencl", "OpenCL kernels and a C library that launches them", "cl", {"max_num_threads": 256}, "",
    "opencl.c", ("-lOpenCL",), "CL/cl.h", "ocl-icd-opencl-dev and opencl-headers",
)  # fmt: skip
CUDA = Language(
    "cuda", "CUDA kernels and, with nvcc, a C library that launches them", "cu", host="cuda.c", link=("-ldl",)
)
METAL = Language(
    "metal", "Metal kernels and a launch table", "metal", {"max_num_threads": 256}, spelled={"nearbyint": "rint"}
)
WEBGPU = Language(
    "webgpu", "WebGPU kernels and a module for browsers that launches them", "wgsl", {"max_num_threads": 256},
    module="model.mjs",
)  # fmt: skip

LANGUAGES = {language.name: language for language in (OPENCL, CUDA, METAL, WEBGPU)}

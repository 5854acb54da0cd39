"""The texts of the kit for iOS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qc.backends.kits.facts import Facts
from qc.backends.kits.kotlin import unlimited
from qc.backends.kits.names import camel, constants
from qc.ir.model import Port

__all__ = ["runtime_texts"]

_USES = {
    "generate": 'for try await piece in model.generate("Once upon a time") { print(piece, terminator: "") }',
    "embed": 'let vector = try model.embed("a leaf")',
    "run": "let outputs = try model.run(inputs)",
}

_NOTES = """
## A smaller runtime

`../required_operators.config` lists the operators of this model. With it, ONNX Runtime's own build script makes a
framework that holds only these, and loads `model.ort`:

```sh
python tools/ci_build/github/apple/build_apple_framework.py --include_ops_by_config required_operators.config \\
  tools/ci_build/github/apple/default_full_apple_framework_build_settings.json
```

`report.html` says what Core ML would take of the model; by default everything runs on the CPU's integer kernels.
"""


def runtime_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with ONNX Runtime."""
    signature = facts.signature
    package = "https://github.com/microsoft/onnxruntime-swift-package-manager"
    held = ["manifest.json", "model.ort", *(["tokenizer.json", "tokenizer_config.json"] if facts.tokenizer else [])]
    return {
        "swift_dependencies": f'        .package(url: "{package}", from: "{facts.runtime[1]}.0"),',
        "swift_products": f'{" " * 16}.product(name: "onnxruntime", package: "{package.rpartition("/")[2]}"),',
        "swift_title": _text(facts.title)[1:-1],
        "task": facts.task,
        "has_tokenizer": str(facts.tokenizer).lower(),
        "swift_bos": "nil" if facts.bos is None else str(facts.bos),
        "stop": ", ".join(map(str, facts.stop)),
        "limit": str(facts.limit or unlimited),
        "pooling": facts.pooling,
        "normalize": str(facts.normalize).lower(),
        "swift_inputs": _ports(signature.inputs),
        "swift_outputs": _ports(signature.outputs),
        "swift_caches": "\n".join(f"        ({_text(a.name)}, {_text(b.name)})," for a, b in signature.caches),
        "swift_input_names": _names(signature.inputs),
        "swift_output_names": _names(signature.outputs),
        "swift_files": ", ".join(f"`{name}`" for name in held),
        "swift_use": _USES[facts.task],
        "swift_refuses": f"a runtime older than\n{facts.runtime[1]}, ",
        "swift_notes": _NOTES,
    }


def _ports(ports: Sequence[Port]) -> str:
    return "\n".join(f"        {_port(p)}," for p in ports)


def _port(port: Port) -> str:
    shape = ", ".join(str(d) if isinstance(d, int) else "nil" for d in port.shape)
    return f'Port(name: {_text(port.name)}, type: "{port.dtype.name.lower()}", shape: [{shape}], role: "{port.role}")'


def _names(ports: Sequence[Port]) -> str:
    return "\n".join(f"    public static let {a} = {_text(b)}" for a, b in constants(ports, camel))


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

"""The texts of the kit for iOS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qc.backends.kits.facts import Facts
from qc.backends.kits.interface import SWIFT

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
    package = "https://github.com/microsoft/onnxruntime-swift-package-manager"
    held = ["manifest.json", "model.ort", *(["tokenizer.json", "tokenizer_config.json"] if facts.tokenizer else [])]
    return SWIFT.texts(facts) | {
        "swift_dependencies": f'        .package(url: "{package}", from: "{facts.runtime[1]}.0"),',
        "swift_products": f'{" " * 16}.product(name: "onnxruntime", package: "{package.rpartition("/")[2]}"),',
        "swift_files": ", ".join(f"`{name}`" for name in held),
        "swift_use": _USES[facts.task],
        "swift_refuses": f"a runtime older than\n{facts.runtime[1]}, ",
        "swift_notes": _NOTES,
    }

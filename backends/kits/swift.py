"""The texts of the kit for iOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qc.backends.kits.c_language import generates
from qc.backends.kits.facts import Facts
from qc.backends.kits.fixed import FixedFiles
from qc.backends.kits.interface import SWIFT

__all__ = ["fixed_texts", "library_texts", "runtime_texts"]

_USES = {
    "generate": 'for try await piece in model.generate("Once upon a time") { print(piece, terminator: "") }',
    "embed": 'let vector = try model.embed("a leaf")',
    "run": "let outputs = try model.run(inputs)",
}

_GENERATE = """
    /// Calls `onToken` with each token of the continuation until it returns false.
    ///
    /// - Parameter temperature: 0 chooses the most probable token.
    public func generate(
        tokens: [Int], maxTokens: Int = 64, temperature: Float = 0, seed: UInt64 = 0, onToken: (Int) -> Bool
    ) throws {
        precondition((1..<Interface.limit).contains(tokens.count), "expected 1 to \\(Interface.limit - 1) tokens")
        try succeed(qc_reset(instance))
        var sampling = qc_sampling()
        sampling.temperature = temperature
        sampling.seed = seed
        var fresh = tokens.map(Int64.init)
        for _ in 0..<min(maxTokens, Interface.limit - tokens.count) {
            try succeed(qc_feed(instance, fresh, Int64(fresh.count)))
            var token: Int64 = 0
            try succeed(qc_sample(instance, &sampling, &token))
            if Interface.stop.contains(Int(token)) || !onToken(Int(token)) { return }
            fresh = [token]
        }
    }

    /// The continuation of a text, piece by piece.
    public func generate(
        _ prompt: String, maxTokens: Int = 64, temperature: Float = 0, seed: UInt64 = 0
    ) -> AsyncThrowingStream<String, Error> {
        stream(text) { text, onToken in
            let tokens = text.prompt(prompt)
            try self.generate(
                tokens: tokens, maxTokens: maxTokens, temperature: temperature, seed: seed, onToken: onToken)
        }
    }
"""

_TARGETS = """\
        .target(name: "CQcModel", dependencies: ["QCKernels"]),
        .binaryTarget(name: "QCKernels", path: "QCKernels.xcframework"),
"""

_ROWS = """\
| `Sources/CQcModel` | `../model.c` and `../model.h` as a module for Swift |
| `QCKernels.xcframework` | the kernels, for devices and for the simulator on Apple silicon |
"""

_LIBRARY_NOTES = """
`qc_open` also refuses weights of another library, and a processor without the instructions that the kernels were
compiled for. Nothing else is needed at run time. A Mac with an Intel processor has no simulator for it.
"""

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


_FIXED_NOTES = """
`Steps.swift` opens the graphs with Core ML. What that does not take runs on the processor.
"""


def runtime_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with ONNX Runtime."""
    return _over_runtime(facts, ["model.ort"]) | {"swift_notes": _NOTES}


def fixed_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with ONNX Runtime in front of Core ML."""
    files = FixedFiles.of(directory)
    return _over_runtime(facts, files.names) | {
        "graphs": SWIFT.texts(facts, files.graphs)["graphs"],
        "swift_names": ", ".join(f'"{n}"' for n in files.names),
        "swift_notes": _FIXED_NOTES,
    }


def _over_runtime(facts: Facts, models: Sequence[str]) -> dict[str, str]:
    package = "https://github.com/microsoft/onnxruntime-swift-package-manager"
    return _texts(facts, models) | {
        "swift_platforms": ".iOS(.v16), .macOS(.v13)",
        "swift_dependencies": f'        .package(url: "{package}", from: "{facts.runtime[1]}.0"),\n',
        "swift_targets": "",
        "swift_product": f'.product(name: "onnxruntime", package: "{package.rpartition("/")[2]}")',
        "swift_rows": "| `Steps.swift` | feeds a text to the graphs, a part at a time |\n",
        "swift_use": _USES[facts.task],
        "swift_refuses": f"a runtime older than\n{facts.runtime[1]}, ",
    }


def library_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with the C library."""
    text = generates(directory)
    return _texts(facts, ["model.weights"]) | {
        "swift_platforms": ".iOS(.v16)",
        "swift_dependencies": "",
        "swift_targets": _TARGETS,
        "swift_product": '"CQcModel"',
        "swift_rows": _ROWS,
        "swift_use": _USES["generate"] if text else "try model.run(dims, inputs: inputs, outputs: outputs)",
        "swift_generate": _GENERATE if text else "",
        "swift_refuses": "",
        "swift_notes": _LIBRARY_NOTES,
    }


def _texts(facts: Facts, models: Sequence[str]) -> dict[str, str]:
    held = ["manifest.json", *models, *(["tokenizer.json", "tokenizer_config.json"] if facts.tokenizer else [])]
    return SWIFT.texts(facts) | {"swift_files": ", ".join(f"`{name}`" for name in held)}

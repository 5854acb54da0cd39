"""The texts of the kit for Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qc.backends.kits.facts import Facts

__all__ = ["texts"]

_COMMANDS = {
    "generate": '\npython model.py "Once upon a time"',
    "embed": '\npython model.py "a question" sentences.txt',
    "run": "",
}
_USES = {
    "generate": 'print("".join(model.generate("Once upon a time")))',
    "embed": 'print(model.embed("a leaf") @ model.embed("a tree"))',
    "run": "outputs = model.run(inputs)  # arrays by the names in interface.json",
}


def texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """The texts that depend on the model."""
    package, minimum = facts.runtime
    also = "" if package == "onnxruntime" else "onnxruntime\n"
    return {
        "python_command": _COMMANDS[facts.task],
        "python_use": _USES[facts.task],
        "python_runtime": f"{also}{package}>={minimum}",
    }

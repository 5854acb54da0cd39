"""Names of tensors as other languages spell constants, each once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from qc.ir.model import Port

__all__ = ["camel", "constants", "upper"]

_SWIFT_WORDS = re.compile(
    "associatedtype|class|deinit|enum|extension|func|import|init|inout|internal|let|operator|private|protocol|public|"
    "static|struct|subscript|typealias|var|break|case|continue|default|defer|do|else|fallthrough|for|guard|if|in|repeat|"
    "return|switch|where|while|as|catch|false|is|nil|rethrows|self|super|throw|throws|true|try"
)


def constants(ports: Sequence[Port], spell: Callable[[str], str]) -> list[tuple[str, str]]:
    """A constant and the name that it stands for, of each port; names that are spelled alike get a number."""
    found: dict[str, str] = {}
    for port in ports:
        first = spelled = spell(port.name)
        number = 2
        while spelled in found:
            spelled, number = f"{first}{number}", number + 1
        found[spelled] = port.name
    return list(found.items())


def upper(name: str) -> str:
    """``past_key_values.0.key`` is ``PAST_KEY_VALUES_0_KEY``."""
    spelled = re.sub(r"\W+", "_", name).upper()
    return spelled if spelled[:1].isalpha() else f"_{spelled}"


def camel(name: str) -> str:
    """``past_key_values.0.key`` is ``pastKeyValues0Key``; words of Swift stand between backticks."""
    first, *rest = re.findall(r"[^\W_]+", name) or [""]
    spelled = first[:1].lower() + first[1:] + "".join(word[:1].upper() + word[1:] for word in rest)
    if not spelled[:1].isalpha():
        return f"_{spelled}"
    return f"`{spelled}`" if _SWIFT_WORDS.fullmatch(spelled) else spelled

"""Inputs of a model: checked against its signature, or made from token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.model import ANY_SHAPE, Port, Signature

__all__ = ["cache_shape", "check_inputs", "require_tokens", "text_batches", "text_inputs"]


def check_inputs(signature: Signature, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns exactly the inputs that the signature names, after a check of type and shape.

    A sequence is given as a list, or as its items under the names ``name[0]``, ``name[1]``...; an optional may be
    left out.

    Raises:
        InputError: With every input that is missing, or of another type or shape; all of them at once.
    """
    found, problems = {}, []
    for port in signature.inputs:
        if port.kind == "sequence":
            found[port.name] = _items(port, inputs, problems)
            continue
        if port.name not in inputs:
            if port.kind == "optional":
                found[port.name] = None
            else:
                problems.append(f"{port.name}: expected {_spell(port)}, found nothing")
            continue
        array = np.asarray(inputs[port.name])
        if not _matches(port, array):
            problems.append(f"{port.name}: expected {_spell(port)}, found {array.dtype} {list(array.shape)}")
        found[port.name] = array
    if problems:
        raise InputError(
            "These inputs do not fit the model:\n  "
            + "\n  ".join(problems)
            + "\nGive an array of that type and shape under each name."
        )
    return found


def _items(port: Port, inputs: Mapping[str, np.ndarray], problems: list[str]) -> list[np.ndarray]:
    """The items of a sequence; what does not fit is added to `problems`."""
    given = inputs.get(port.name)
    if given is None:
        names = [n for n in (f"{port.name}[{i}]" for i in range(len(inputs))) if n in inputs]
        given = [inputs[n] for n in names]
    items = [np.asarray(item) for item in given]
    if not items:
        problems.append(f"{port.name}: expected {_spell(port)}, found nothing")
    for i, item in enumerate(items):
        if not _matches(port, item):
            problems.append(f"{port.name}[{i}]: expected {_spell(port)}, found {item.dtype} {list(item.shape)}")
    return items


def require_tokens(signature: Signature) -> Port:
    """Returns the input that takes token ids.

    Raises:
        InputError: If the model takes none.
    """
    port = signature.input("tokens")
    if port is None:
        raise InputError(
            f"Expected a model that takes token ids, found one of {', '.join(p.name for p in signature.inputs)}. "
            "Give it arrays instead of text (--input FILE.npz)."
        )
    return port


def text_inputs(
    signature: Signature, tokens: np.ndarray, *, past: int = 0, decoder: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Makes all inputs of a text model for unpadded token ids: full masks, running positions, an empty cache.

    Args:
        signature: The model's.
        tokens: ``[batch, seq]`` ids.
        past: Number of tokens that the cache holds; cache inputs are made only if 0, else the caller adds them.
        decoder: ``[batch, length]`` ids that the decoder of an encoder-decoder reads.

    Raises:
        InputError: If the model takes no tokens, or an input that nothing is known about.
    """
    require_tokens(signature)
    batch, length = tokens.shape
    made: dict[str, np.ndarray] = {}
    for port in signature.inputs:
        match port.role:
            case "tokens":
                value = tokens
            case "mask":
                value = np.ones((batch, past + length))
            case "positions":
                value = np.broadcast_to(np.arange(past, past + length), (batch, length))
            case "token_types":
                value = np.zeros((batch, length))
            case "decoder_tokens" if decoder is not None:
                value = decoder
            case "decoder_mask" if decoder is not None:
                value = np.ones(decoder.shape)
            case "past_key" | "past_value":
                if past:
                    continue
                value = np.zeros(cache_shape(port, batch, 0))
            case _:
                raise InputError(
                    f"Input {port.name!r} ({_spell(port)}) cannot be made from text. Give all inputs as arrays."
                )
        if len(port.shape) == 1 and batch == 1 and value.ndim == 2:
            value = value[0]
        made[port.name] = np.ascontiguousarray(value, dtype=port.dtype.numpy())
    return made


def text_batches(
    signature: Signature,
    texts: Sequence[Sequence[int]],
    decoder: Sequence[Sequence[int]] | None = None,
    *,
    size: int = 16,
) -> list[dict[str, np.ndarray]]:
    """Makes the inputs for several texts; those of equal lengths share a batch, so that nothing is padded.

    Args:
        signature: The model's.
        texts: Token ids of each text.
        decoder: What the decoder of an encoder-decoder reads beside each.
        size: Largest number of texts in a batch.
    """
    batches = []
    rows = [(t, d) for t, d in zip(texts, texts if decoder is None else decoder, strict=True) if t]
    for lengths in sorted({(len(t), len(d)) for t, d in rows}):
        alike = [row for row in rows if (len(row[0]), len(row[1])) == lengths]
        for start in range(0, len(alike), size):
            tokens, read = (np.array(part, np.int64) for part in zip(*alike[start : start + size], strict=True))
            batches.append(text_inputs(signature, tokens, decoder=None if decoder is None else read))
    return batches


def cache_shape(port: Port, batch: int, length: int) -> tuple[int, ...]:
    """The shape of a cache that holds `length` tokens: of the symbolic axes the first is the batch, the rest time."""
    axes = [batch if axis == 0 else dim for axis, dim in enumerate(port.shape)]
    return tuple(dim if isinstance(dim, int) else length for dim in axes)


def _matches(port: Port, array: np.ndarray) -> bool:
    text = port.dtype == ir.DataType.STRING
    same_type = array.dtype.kind in "USO" if text else array.dtype == port.dtype.numpy()
    if port.shape == ANY_SHAPE:
        return same_type
    same_rank = len(port.shape) == array.ndim
    return (
        same_type
        and same_rank
        and all(
            not isinstance(expected, int) or expected == found
            for expected, found in zip(port.shape, array.shape, strict=True)
        )
    )


def _spell(port: Port) -> str:
    dims = ", ".join("?" if d is None else str(d) for d in port.shape)
    return ("" if port.kind == "tensor" else f"{port.kind} of ") + f"{port.dtype.name.lower()} [{dims}]"

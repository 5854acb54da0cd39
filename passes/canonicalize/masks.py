"""What an attention mask means, found by evaluating it: causal, causal within a window, padding only, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from qc.passes.canonicalize._evaluate import Piece
from qc.passes.canonicalize._graph import Decline

__all__ = ["Mask", "describe_mask"]

Kind = Literal["causal", "causal_window", "padding", "none", "unknown"]

_BANNED = -1e4
_POSITIONS = 8192  # longest cache that is tried when the model does not say how many positions it knows
_WIDEST = 32768  # a mask row of that many keys is still small; windows in use are 4096 at most
_MASKS = ("mask", "decoder_mask")


@dataclasses.dataclass(frozen=True)
class Mask:
    """The meaning of a mask.

    Query i of a sequence behind ``past`` cached keys stands at p = past + i. It sees key j if

    | kind | condition |
    |---|---|
    | ``causal`` | ``j <= p`` |
    | ``causal_window`` | ``p - window < j <= p`` |
    | ``padding``, ``none`` | always |
    | ``unknown`` | anything else; `reason` says what did not fit |

    Attributes:
        kind: Which condition.
        window: Number of keys that a query sees, itself included, for ``causal_window``.
        padded: Whether the model's attention mask excludes keys on top (always so for ``padding``).
        reason: Why the mask is ``unknown``.
    """

    kind: Kind
    window: int | None = None
    padded: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """Sizes of one evaluation, and how many keys of each row are padding, at the left end."""

    batch: int
    seq: int
    past: int
    padding: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.past + self.seq


def describe_mask(model: ir.Model, value: ir.Value | None) -> Mask:
    """Says what the mask input of an Attention node means.

    The subgraph that computes it is run on a few batches, lengths, caches and paddings, and compared with the formula
    of each kind. The roles of the model's inputs (``tokens``, ``mask``, ``positions``, ``past_key``) say what is what.
    A kind is only returned if it gives every single entry of every evaluation, caches as long as the model allows
    included.

    Args:
        model: The model whose main graph computes the mask; unchanged.
        value: The mask, boolean or added to the scores; None if there is none.
    """
    if value is None:
        return Mask("none")
    try:
        piece = Piece(model.graph, [value])
        probe = _Probe(piece, value)
        return _describe(probe, int(model.metadata_props.get("qc.max_positions", 0)) or _POSITIONS)
    except Decline as reason:
        return Mask("unknown", reason=str(reason))


def _describe(probe: _Probe, positions: int) -> Mask:
    padded = probe.reads_mask
    if not padded and not probe.cached and probe.allows_all(_Setting(2, 5, 0)) and probe.allows_all(_Setting(1, 1, 0)):
        return Mask("none")
    longest = max(2, min(positions, _WIDEST))
    settings = [_Setting(2, 3, 4), _Setting(1, 1, 5), _Setting(2, 5, 0)]
    if not probe.cached:
        settings = [_Setting(2, 5, 0), _Setting(1, 1, 0), _Setting(3, 7, 0)]
    if padded:
        settings += [dataclasses.replace(s, padding=(0, 2, 1)[: s.batch]) for s in settings if s.total > 2]
    if not probe.cached:
        window = None
    else:
        row = probe.run(_Setting(1, 1, longest - 1))[0, 0]
        seen = int(row.sum())
        window = seen if seen < longest else None
        if window is not None:
            settings += [_Setting(1, 4, window + k) for k in (-2, 0, 3) if window + k > 0]
    candidates: list[tuple[Kind, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = [
        ("none", lambda p, j: np.full(np.broadcast_shapes(p.shape, j.shape), True)),
        ("causal", lambda p, j: j <= p),
    ]
    if window is not None:
        candidates = [("causal_window", lambda p, j: (j <= p) & (p - j < window))]
    reason = ""
    for kind, sees in candidates:
        differs = next((s for s in settings if not _fits(probe, s, sees)), None)
        if differs is not None:
            reason = f"it is not {kind} for {differs.seq} queries behind {differs.past} keys, padding {differs.padding}"
        elif kind == "none":
            return Mask("padding" if padded else "none", padded=padded)
        else:
            return Mask(kind, window, padded)
    return Mask("unknown", reason=reason)


def _fits(probe: _Probe, setting: _Setting, sees: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """Whether every entry of the mask is what the formula says, in the rows of real (not padding) queries."""
    found = probe.run(setting)
    queries = setting.past + np.arange(setting.seq)[:, None]
    keys = np.arange(setting.total)[None]
    expected = np.broadcast_to(sees(queries, keys), found.shape)
    real = np.ones((setting.batch, setting.seq, 1), bool)
    if probe.reads_mask:
        kept = probe.attention(setting).astype(bool)
        expected = expected & kept[:, None, :]
        real = kept[:, setting.past :, None]  # what a padding query sees never reaches a real one
    return bool(np.all((found == expected) | ~real))


class _Probe:
    """Evaluates one mask on settings."""

    def __init__(self, piece: Piece, value: ir.Value) -> None:
        self._piece, self._value = piece, value
        # Inputs of which only the shape matters carry sizes; those that are read must have a known meaning.
        self._roles = {v: v.metadata_props.get("qc.role", "other").partition(".")[0] for v in piece.reads}
        unknown = [v.name for v, role in self._roles.items() if role not in (*_MASKS, "positions", "tokens")]
        if unknown:
            raise Decline(f"it depends on {', '.join(unknown)}")
        self.reads_mask = any(role in _MASKS for role in self._roles.values())
        inputs = (v for v in piece.graph_inputs if v.metadata_props.get("qc.role", "").startswith("past_"))
        self.cached = next(inputs, None) is not None

    def attention(self, setting: _Setting) -> np.ndarray:
        """The model's attention mask ``[batch, total]``: 0 for padding."""
        kept = np.ones((setting.batch, setting.total), np.int64)
        for row, count in enumerate(setting.padding):
            kept[row, :count] = 0
        return kept

    def run(self, setting: _Setting) -> np.ndarray:
        """Which keys each query sees, boolean ``[batch, seq, total]``.

        Raises:
            Decline: If the mask differs between heads, or holds scores other than 0 and "masked".
        """
        found = self._allowed(setting)
        found = found.reshape((1,) * (4 - found.ndim) + found.shape)
        if found.shape[1] != 1:
            if not np.all(found == found[:, :1]):
                raise Decline("it differs between heads")
            found = found[:, :1]
        shape = (setting.batch, 1, setting.seq, setting.total)
        try:
            return np.broadcast_to(found, shape)[:, 0]
        except ValueError:
            raise Decline(f"its shape is {found.shape}, expected {shape}") from None

    def allows_all(self, setting: _Setting) -> bool:
        """Whether nothing is masked, whatever the shape of the mask."""
        return bool(self._allowed(setting).all())

    def _allowed(self, setting: _Setting) -> np.ndarray:
        feeds = {value: self._array(role, setting).astype(value.dtype.numpy()) for value, role in self._roles.items()}
        (found,) = self._piece.run(feeds, dict(self._sizes(setting)))
        if found.dtype == bool:
            return found
        if not np.all((found == 0) | (found <= _BANNED)):
            raise Decline("it adds a bias to the scores, not only a mask")
        return found == 0

    def _array(self, role: str, setting: _Setting) -> np.ndarray:
        if role in _MASKS:
            return self.attention(setting)
        if role == "tokens":
            return np.ones((setting.batch, setting.seq), np.int64)
        return np.broadcast_to(setting.past + np.arange(setting.seq), (setting.batch, setting.seq))

    def _sizes(self, setting: _Setting) -> Iterator[tuple[str, int]]:
        """Sizes of the symbolic dimensions, by what the roles of the inputs say about their axes."""
        for value in self._piece.graph_inputs:
            role = value.metadata_props.get("qc.role", "other").partition(".")[0]
            cache = (setting.batch, None, setting.past, None)
            plain = (setting.batch, setting.total if role in _MASKS else setting.seq)
            axes = cache if role.startswith("past_") else plain
            for dim, size in zip(value.shape or (), axes, strict=False):
                if not isinstance(dim, int) and size is not None:
                    yield str(dim.value), size

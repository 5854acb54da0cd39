"""A quantized weight as a differentiable function of what is learned about it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from qc.ir.quant import Affine, FloatScale, Format, QuantizedTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qc.passes.tune._factors import Scaling

__all__ = ["LearnedWeight", "learnable"]

_TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}

_EDGE = 0.5 - 1e-4
"""How far a latent number may be from the code that it starts at; beyond half a step it would round to another."""

_MEANT = 0.25
"""Where a latent number starts whose code feedback has moved away from it: the code is meant, so not at its edge, from
which the first steps would push it back."""

_TINY = 1e-20


def learnable(format: Format) -> str:
    """Why weights of this format cannot be learned; empty if they can."""
    values = format.values
    if not isinstance(values, Affine) or values.half or values.floating:
        return f"the values of {values} are not on a grid with integer zero points"
    if format.axis != "in" or not isinstance(format.scale, FloatScale):
        return f"the scales of {format} do not lie along its rows as floats"
    return ""


class LearnedWeight:
    """``w = s (clip(round(L s0/s + V) + z, 0, 2^b - 1) - z)``, with gradients passed straight through the rounding.

    ``L`` is the float weight in units of the scale ``s0`` that it starts with. Learned are, as far as asked for:

    * ``rounding``: V in [-1/2, 1/2] of each element, which code to choose of the two next to it (AutoRound, arXiv
      2309.05516, equation 3);
    * ``weights``: V without bounds, that is the weight itself (EfficientQAT, arXiv 2407.11062, Block-AP);
    * ``low-rank``: V = A B / s0 of a small rank (QLLM, arXiv 2310.08041, section 4.3), absorbed by the codes;
    * ``range``: factors of both ends of each group's range (OmniQuant, arXiv 2308.13137, equation 2); scale and zero
      point follow;
    * ``scale``: factors of the scales alone; with nothing else, codes stay as they are (PEQA, arXiv 2305.14152).

    With factors of channel groups (`scaling`), ``L`` is multiplied by them before it is rounded, and the ends of each
    group's range grow as the largest and smallest of its numbers do (OmniQuant, section 3.3).

    Where nothing has been learned yet, it is exactly the tensor that it started as, however its codes were chosen:
    where feedback (GPTQ) has chosen another code than the nearest, the latent number is brought to that code.

    Attributes:
        parameters: What is learned, by name.
    """

    def __init__(
        self,
        weight: np.ndarray,
        tensor: QuantizedTensor,
        learn: Collection[str],
        *,
        scaling: Scaling | None = None,
        rank: int = 4,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Starts at `tensor`.

        Args:
            weight: The float weight ``[N, K]``.
            tensor: What it was quantized to; see `learnable`.
            learn: What is learned, see above.
            scaling: What the weight is multiplied with, if that is learned.
            rank: Of ``low-rank``.
            seed: Of what is random in ``low-rank``.
            device: Where to compute.
        """
        values, scale = tensor.format.values, tensor.format.scale
        assert isinstance(values, Affine)
        assert isinstance(scale, FloatScale)
        self._format, self._values, self._stored = tensor.format, values, _TYPES[scale.dtype]
        self._rows, self._columns = tensor.shape
        self._groups = tensor.format.groups(self._columns)
        self._width = tensor.format.width(self._columns)
        self._scaling = scaling
        self._top = float(values.high - values.low)
        codes = self._grouped(torch.from_numpy(tensor.codes.astype(np.float32) - values.low).to(device))
        s0 = torch.from_numpy(scale.decode(tensor.params).astype(np.float32)).to(device)
        zero = np.full(s0.shape, -values.low) if values.symmetric else tensor.params["zero_point"]
        self._scale = s0.reshape(self._rows, self._groups, 1)
        self._zero = torch.from_numpy(zero.astype(np.float32)).to(device).reshape(self._rows, self._groups, 1)
        units = codes - self._zero
        latent = self._grouped(torch.from_numpy(np.array(weight, np.float32)).to(device)) / self._scale
        beyond = ((codes >= self._top) & (latent > units)) | ((codes <= 0) & (latent < units))
        off = latent - units
        off = torch.where(off.abs() > 0.5, _MEANT * off.sign(), off.clamp(-_EDGE, _EDGE))
        self._moves = scaling is not None or bool({"rounding", "weights", "low-rank", "range"} & set(learn))
        # Codes that stay are kept in fewer bytes: there may be a whole network of them.
        self._latent = torch.where(beyond, latent, units + off) if self._moves else units.to(torch.int16)
        self._latent.reshape(self._rows, -1)[:, self._columns :] = 0  # what fills up the last group is in no range
        self._bounded = "weights" not in learn
        self.parameters: dict[str, torch.Tensor] = {}
        if "rounding" in learn or "weights" in learn:
            self._add("offset", torch.zeros_like(self._latent))
        if "low-rank" in learn:
            generator = torch.Generator().manual_seed(seed)
            down = torch.randn(rank, self._columns, generator=generator).to(device) / self._columns**0.5
            self._add("down", down)
            self._add("up", torch.zeros(self._rows, rank, device=device))
        if "range" in learn:
            self._add("high", torch.zeros_like(self._scale))
            if not values.symmetric:
                self._add("low", torch.zeros_like(self._scale))
        if "scale" in learn:
            self._add("factor", torch.zeros_like(self._scale))

    def _add(self, name: str, start: torch.Tensor) -> None:
        self.parameters[name] = start.requires_grad_()

    def _grouped(self, matrix: torch.Tensor) -> torch.Tensor:
        missing = self._groups * self._width - self._columns
        padded = torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix
        return padded.reshape(self._rows, self._groups, self._width)

    def __call__(self) -> torch.Tensor:
        """The decoded weight ``[N, K]``, as it would be exported now."""
        codes, scale, zero = self._quantized()
        return ((codes - zero) * scale).reshape(self._rows, -1)[:, : self._columns]

    @torch.no_grad()
    def bound(self) -> None:
        """Brings what is learned back into its bounds."""
        if "offset" in self.parameters and self._bounded:
            self.parameters["offset"].clamp_(-0.5, 0.5)
        for name in ("high", "low", "factor"):
            if name in self.parameters:
                self.parameters[name].clamp_(-0.5, 0.5)

    @torch.no_grad()
    def export(self) -> QuantizedTensor:
        """The integers, scales and zero points."""
        codes, scale, zero = self._quantized()
        codes = codes.reshape(self._rows, -1)[:, : self._columns] + self._values.low
        params = dict(self._format.scale.encode(scale.reshape(self._rows, self._groups).cpu().numpy()))
        if not self._values.symmetric:
            params["zero_point"] = zero.reshape(self._rows, self._groups).cpu().numpy().astype(np.uint8)
        kind = np.int8 if self._values.symmetric else np.uint8
        return QuantizedTensor(self._format, codes.cpu().numpy().astype(kind), params)

    @torch.no_grad()
    def stored(self) -> torch.Tensor:
        """The decoded weight as it would be stored."""
        return torch.from_numpy(self.export().decode()).to(self._scale.device)

    def _quantized(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latent = self._latent if self._scaling is None else self._latent * self._grouped(self._scaling())
        scale, zero = self._range(latent)
        if not self._moves:
            return latent + self._zero, scale, zero
        x = latent if scale is self._scale else latent * (self._scale / scale)
        for offset in self._offsets():
            x = x + offset
        return torch.clamp(_rounded(x) + zero, 0, self._top), scale, zero

    def _offsets(self) -> Iterator[torch.Tensor]:
        if "offset" in self.parameters:
            yield self.parameters["offset"]
        if "up" in self.parameters:
            yield self._grouped(self.parameters["up"] @ self.parameters["down"]) / self._scale

    def _range(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = self._scale, self._zero
        low, high = self._ends(latent)
        if high is not None and low is not None:
            low, high = -zero * low, (self._top - zero) * high
            factor = (high - low) / self._top
            zero = torch.clamp(_rounded(-low / factor), 0, self._top)
            scale = scale * factor
        elif high is not None:
            scale = scale * high
        if "factor" in self.parameters:
            scale = scale * (1 + self.parameters["factor"])
        if scale is not self._scale and self._stored != torch.float32:
            scale = scale + (scale.to(self._stored).float() - scale).detach()
        return scale, zero

    def _ends(self, latent: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Factors of the lower and upper ends of ranges; None if they stay, and for the lower if it is the opposite."""
        low, high = (1 + self.parameters[n] if n in self.parameters else None for n in ("low", "high"))
        if self._scaling is None:
            return low, high
        if self._values.symmetric:
            return None, _growth(self._latent.abs(), latent.abs()) * (1.0 if high is None else high)
        return (
            _growth(-self._latent, -latent) * (1.0 if low is None else low),
            _growth(self._latent, latent) * (1.0 if high is None else high),
        )


def _growth(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """By how much the largest number of each group has grown; 1 where none is positive."""
    old, new = (x.amax(-1, keepdim=True).clamp(min=_TINY) for x in (before, after))
    return new / old


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x + (torch.round(x) - x).detach()

"""The grid of a static activation as a differentiable function of what is learned about it."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["LearnedGrid"]

_FARTHEST = 0.5


class LearnedGrid:
    """``s (1 + f)``: the steps of a grid, with its zero point as it is.

    The gradient of a step is that of LSQ (arXiv 1902.08153, equation 3): what rounding costs in the range, and what
    clipping costs beyond it. MobileQuant (arXiv 2408.13933) learns ranges in this way.

    Attributes:
        parameters: What is learned, by name.
    """

    def __init__(self, scale: np.ndarray, device: str) -> None:
        """Starts at `scale`."""
        self._scale = torch.from_numpy(np.array(scale, np.float32)).to(device)
        self.parameters = {"factor": torch.zeros_like(self._scale).requires_grad_()}

    def __call__(self) -> torch.Tensor:
        """The steps."""
        return self._scale * (1 + self.parameters["factor"])

    @torch.no_grad()
    def stored(self) -> torch.Tensor:
        """The steps as they would be stored."""
        return self()

    @torch.no_grad()
    def bound(self) -> None:
        """Brings what is learned back into its bounds."""
        self.parameters["factor"].clamp_(-_FARTHEST, _FARTHEST)

"""Windows that move over images: of convolutions and of pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qc.backends.tvm.shapes import Dim, divide, smallest

__all__ = ["AXES", "Window"]

AXES = 2
"""Of an image."""


@dataclasses.dataclass(frozen=True)
class Window:
    """How a window moves over an image: numbers of its two axes.

    Attributes:
        sizes: Elements of the window.
        strides: From one place to the next.
        dilations: From one element to the next.
        before: Padding in front.
        behind: Padding at the end.
    """

    sizes: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    before: tuple[int, int]
    behind: tuple[int, int]

    @property
    def c(self) -> str:
        """Its numbers as arguments in C, without the padding at the end."""
        return ", ".join(map(str, (*self.sizes, *self.strides, *self.dilations, *self.before)))

    def places(self, image: Sequence[Dim], *, ceil: bool = False) -> list[Dim]:
        """How many there are along each axis of an image; with `ceil` the last may reach beyond the padding."""
        found = []
        for n, size, stride, dilation, before, behind in zip(image, *dataclasses.astuple(self), strict=True):
            left = n + (before + behind - dilation * (size - 1) - 1)
            if ceil:  # but no window starts in the padding at the end
                left = smallest(left + (stride - 1), n + (before - 1))
            found.append(divide(left, stride) + 1)
        return found

    def covered(self, places: Sequence[Dim], more: Sequence[int]) -> list[Dim]:
        """The size of each axis of an image with so many places, and `more` at the end that no window covers."""
        found = []
        for n, extra, size, stride, dilation, before, behind in zip(
            places, more, *dataclasses.astuple(self), strict=True
        ):
            found.append((n - 1) * stride + (dilation * (size - 1) + 1 + extra - before - behind))
        return found

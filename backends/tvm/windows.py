"""Windows that move over images: of convolutions and of pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qc.backends.tvm.shapes import Dim, divide, smallest

__all__ = ["AXES", "Numbers", "Window"]

AXES = 3
"""Of an image: depth, height and width. One that has fewer is one deep, or one high."""

Numbers = tuple[int, int, int]
"""One for each axis."""


@dataclasses.dataclass(frozen=True)
class Window:
    """How a window moves over an image.

    Attributes:
        sizes: Elements of the window.
        strides: From one place to the next.
        dilations: From one element to the next.
        before: Padding in front.
        behind: Padding at the end.
    """

    sizes: Numbers
    strides: Numbers
    dilations: Numbers
    before: Numbers
    behind: Numbers

    @property
    def c(self) -> str:
        """All its numbers as an array in C."""
        numbers = (*self.sizes, *self.strides, *self.dilations, *self.before, *self.behind)
        return f"(const int[]){{{', '.join(map(str, numbers))}}}"

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

    def turned(self) -> Window:
        """The window that moves over the places of this one, apart by its strides, and finds what each element is in.

        Element k of place p lies at ``p * stride + k * dilation - before``; so the element at q lies in the places
        ``p * stride = q + before - k * dilation``, of which the last k comes first.
        """
        front = [
            dilation * (size - 1) - before
            for size, dilation, before in zip(self.sizes, self.dilations, self.before, strict=True)
        ]
        return dataclasses.replace(self, strides=(1, 1, 1), before=(front[0], front[1], front[2]), behind=(0, 0, 0))

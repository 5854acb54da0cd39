"""Turns what exporters write into the one form that every later pass reads."""

from __future__ import annotations

from qc.passes.base import Pass

__all__ = ["canonicalize_passes"]


def canonicalize_passes() -> list[Pass]:
    """The passes that make a float graph canonical, in order."""
    from qc.passes.canonicalize.activations import RecogniseActivations
    from qc.passes.canonicalize.attention import RecogniseAttention
    from qc.passes.canonicalize.batchnorm import FoldBatchNormalization
    from qc.passes.canonicalize.fold import FoldConstants
    from qc.passes.canonicalize.linear import RecogniseLinear
    from qc.passes.canonicalize.norms import RecogniseNorms
    from qc.passes.canonicalize.recurrent import RecogniseRecurrent
    from qc.passes.canonicalize.rotary import RecogniseRotary
    from qc.passes.canonicalize.unstack import UnstackWeights

    return [
        FoldConstants(),
        UnstackWeights(),
        FoldBatchNormalization(),
        RecogniseRecurrent(),
        RecogniseLinear(),
        RecogniseNorms(),
        RecogniseActivations(),
        RecogniseRotary(),
        RecogniseAttention(),
        FoldConstants(),  # what the recognisers put around their operators can be shared
    ]

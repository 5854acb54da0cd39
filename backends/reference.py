"""A model at any stage, run as an artifact is: the float reference that artifacts are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qc.backends.decoding import context_limit, greedy
from qc.backends.inputs import check_inputs
from qc.ir.errors import InternalError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs a `Model` as it stands, in the verifying runtime: nothing is optimized and weights stay on disk.

    Attributes:
        model: The model.
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source.
    """

    def __init__(self, model: Model, *, threads: int = 0) -> None:
        """Loads `model`, which must not be changed and whose files must stay while this object lives.

        Args:
            model: Any valid model.
            threads: Threads within an operator; 0 for one per core.

        Raises:
            UnsupportedError: If ONNX Runtime refuses the model.
        """
        self.model = model
        self.signature = model.signature
        self.provenance = model.provenance
        try:
            self._session = Session(model, threads=threads)
        except InternalError as error:
            raise UnsupportedError(
                f"The model cannot be run: {str(error).removeprefix('Bug: ')}. qc compiles what ONNX Runtime runs; "
                "check that the file runs there, or export it with other operators."
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once. Inputs that the model does not have are ignored.

        Raises:
            InputError: If an input is missing, or of a type or shape that the model does not take.
        """
        return self._session.run(check_inputs(self.signature, inputs))

    def generate(self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """Yields greedily chosen tokens after `tokens` until one is in `stop`, which is not yielded.

        Raises:
            InputError: If the model does not generate text, or the prompt does not fit it.
        """
        limit = context_limit(self.provenance)
        return greedy(self.run, self.signature, tokens, max_tokens, stop, limit=limit)

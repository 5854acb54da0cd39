"""A lowered model, run part after part: for artifacts that would take more memory than everything before them.

Kernels repack weights when they are loaded, so a loaded artifact is larger than its file. A part at a time, the same
kernels compute the same numbers from the same bytes, and memory holds one part and the activations between two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from qc.backends.decoding import generate
from qc.backends.inputs import check_inputs
from qc.backends.sampling import GREEDY, Sampling
from qc.ir.digest import digest_batch
from qc.ir.model import Model
from qc.passes._activations import Shelf, Stream
from qc.passes._partition import Partition

__all__ = ["PartRunner"]

Batch = Mapping[str, np.ndarray]


class PartRunner:
    """Runs a model part after part; every run loads all parts, so what will be asked for is better run at once.

    Attributes:
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source.
        parts: Number of parts that the model is divided into; 1 without repeated blocks.
    """

    def __init__(self, model: Model, load: Callable[[Model], Callable[[Batch], Batch]], shelf: Shelf) -> None:
        """Divides `model`.

        Args:
            model: A model that its runtime runs.
            load: Loads a part in its runtime; the result runs it once, on its inputs by name.
            shelf: Where activations and results are kept.
        """
        self.signature, self.provenance = model.signature, model.provenance
        self._model, self._load, self._shelf = model, load, shelf
        self._partition = Partition(model)
        self.parts = len(self._partition.labels)
        self._known: dict[bytes, dict[str, np.ndarray]] = {}

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Runs all `batches` at once, so that `run` knows what they yield.

        Raises:
            InputError: If a batch does not fit the model.
        """
        stream = Stream((check_inputs(self.signature, batch) for batch in batches), self._shelf)
        names = {port.name for port in self.signature.outputs}
        results = [{k: v for k, v in stream.batch(i).items() if k in names} for i in range(stream.count)]
        for k in range(self.parts):
            part = self._partition.cut(k, to_the_end=True)
            if not part.graph.outputs:
                continue
            run = self._load(part)
            for i in range(stream.count):
                stream.put(i, run(stream.batch(i)))
                results[i].update({name: stream.batch(i)[name] for name in names & set(stream.batch(i))})
            del run  # before the next part is loaded
            stream.retain(self._partition.needed_after(k))
        for batch, found in zip(batches, results, strict=True):
            self._known[digest_batch(batch)] = found

    def run(self, inputs: Batch) -> dict[str, np.ndarray]:
        """Runs once, or returns what the same inputs yielded before.

        Raises:
            InputError: If an input is missing, or of a type or shape that the model does not take.
        """
        key = digest_batch(inputs)
        if key not in self._known:
            self.prepare([inputs])
        return {port.name: self._known[key][port.name] for port in self.signature.outputs}

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yields tokens after `tokens`, slowly, until one is in `stop`, which is not yielded."""
        return generate(self, tokens, max_tokens, stop, sampling)

"""A model at any stage, run as an artifact is: the float reference that artifacts are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import onnx_ir as ir

from qc.backends.decoding import generate
from qc.backends.inputs import check_inputs
from qc.backends.sampling import GREEDY, Sampling
from qc.backends.target import Runner
from qc.ir.digest import digest_batch
from qc.ir.errors import InternalError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.store import Store

__all__ = ["ModelRunner", "Remembered"]

_LARGE = 1 << 20  # bytes; smaller results stay in memory


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

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yields tokens after `tokens`, chosen by `sampling`, until one is in `stop`, which is not yielded.

        Raises:
            InputError: If the model does not generate text, or the prompt does not fit it.
        """
        return generate(self, tokens, max_tokens, stop, sampling)


class Remembered:
    """A runner whose results are kept on disk, so that it need not be in memory together with what it is compared to.

    It runs on a thread of its own, and may be told beforehand what it is going to be asked.

    Attributes:
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source.
    """

    def __init__(self, runner: Runner, store: Store) -> None:
        """Wraps a runner.

        Args:
            runner: Runs once on each input.
            store: Where large results are written; nobody else may write there.
        """
        self.signature = runner.signature
        self.provenance = runner.provenance
        self._runner = runner
        self._store = store
        self._thread = ThreadPoolExecutor(1)
        self._known: dict[bytes, Future[dict[str, np.ndarray | ir.TensorProtocol]]] = {}

    def begin(self, inputs: Mapping[str, np.ndarray]) -> Future[dict[str, np.ndarray | ir.TensorProtocol]]:
        """Runs on `inputs` when those before are done, unless it did or is about to, and does not wait for it."""
        key = digest_batch(inputs)
        if key not in self._known:
            self._known[key] = self._thread.submit(self._results, inputs)
        return self._known[key]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once, or returns what the same inputs yielded before."""
        return {k: v if isinstance(v, np.ndarray) else v.numpy() for k, v in self.begin(inputs).result().items()}

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """As the runner does; nothing is kept."""
        return self._runner.generate(tokens, max_tokens, stop, sampling)

    def close(self) -> None:
        """Stops after the inputs at hand; nothing more can be asked."""
        self._thread.shutdown(cancel_futures=True)

    def _results(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | ir.TensorProtocol]:
        return {name: self._keep(name, value) for name, value in self._runner.run(inputs).items()}

    def _keep(self, name: str, value: np.ndarray) -> np.ndarray | ir.TensorProtocol:
        large = value.nbytes >= _LARGE and value.dtype.kind not in "OUS"
        return self._store.put(name, value) if large else value

"""Runs an emitted directory in ONNX Runtime; decoders generate with a cache that is never copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qc.backends.decoding import generate, plan
from qc.backends.inputs import cache_shape, check_inputs, text_inputs
from qc.backends.ort.emit import MODEL
from qc.backends.ort.genai import shares_buffer
from qc.backends.sampling import GREEDY, Sampling
from qc.ir.errors import InputError
from qc.ir.model import Model, Signature
from qc.ir.runtime import describe, flatten

__all__ = ["OrtRunner", "open_runner"]


def open_runner(directory: Path, *, threads: int = 0, spinning: bool = True, file: str = MODEL) -> OrtRunner:
    """Loads an emitted directory.

    Args:
        directory: Holds ``model.onnx``.
        threads: Threads within an operator; 0 for one per core.
        spinning: Whether idle threads wait actively: faster alone, unfair to whatever runs beside it.
        file: The file that the runtime loads.

    Raises:
        InputError: If the runtime cannot load the file.
    """
    return OrtRunner(Path(directory), threads=threads, spinning=spinning, file=file)


class OrtRunner:
    """A loaded model.

    Attributes:
        signature: Its inputs and outputs with their roles.
        provenance: Facts about its source.
        threads: Threads within an operator; 0 for one per core.
    """

    def __init__(self, directory: Path, *, threads: int, spinning: bool, file: str = MODEL) -> None:
        import onnxruntime as ort

        model = Model.load(directory)
        self.signature = model.signature
        self.provenance = model.provenance
        self.threads = threads
        self._shared = shares_buffer(model)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        options.intra_op_num_threads = threads
        # The arena keeps twice what a run needs, and measured no faster than malloc, in prefill nor in decoding.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        try:
            self._session = ort.InferenceSession(str(directory / file), options, ["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(
                f"ONNX Runtime {ort.__version__} cannot load {directory / file}: {describe(error)}. If the file is "
                "as it was compiled (`qc verify`), this runtime may be too old for it."
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs once. Inputs that the model does not have are ignored.

        Raises:
            InputError: If an input is missing, or of a type or shape that the model does not take.
        """
        checked = check_inputs(self.signature, inputs)
        names = [p.name for p in self.signature.outputs]
        try:
            return flatten(names, self._session.run(names, checked))
        except Exception as error:
            raise _refused(checked, error) from error

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = (), sampling: Sampling = GREEDY
    ) -> Iterator[int]:
        """Yields tokens after `tokens`, until `max_tokens` or one of `stop`, which is not yielded.

        Raises:
            InputError: If the model does not generate text, or the prompt does not fit it.
        """
        if not self.signature.caches:
            return generate(self, tokens, max_tokens, stop, sampling)
        return self._cached(tokens, plan(self, tokens, max_tokens), frozenset(stop), sampling)

    def _cached(
        self, tokens: Sequence[int], max_tokens: int, stop: frozenset[int], sampling: Sampling
    ) -> Iterator[int]:
        """Past and present are bound as buffers of the runtime.

        Attention that writes into its past (shared) gets one buffer per layer, long enough for the whole text, as both;
        attention that appends gets each step's present back as the next step's past.
        """
        import onnxruntime as ort

        pairs = self.signature.caches
        logits = self.signature.output("logits")
        assert logits is not None
        room = len(tokens) + max_tokens if self._shared else 0
        caches = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(cache_shape(past, 1, room), past.dtype.numpy()))
            for past, _ in pairs
        ]
        binding = self._session.io_binding()
        for (past, present), cache in zip(pairs, caches, strict=True):
            binding.bind_ortvalue_input(past.name, cache)
            if self._shared:
                binding.bind_ortvalue_output(present.name, cache)
            else:
                binding.bind_output(present.name, "cpu")
        own = Signature(tuple(p for p in self.signature.inputs if p.role not in ("past_key", "past_value")), ())
        new, done, choose = [int(t) for t in tokens], 0, sampling.chooser()
        found = np.empty(0, logits.dtype.numpy())
        for _ in range(max_tokens):
            inputs = text_inputs(own, np.array([new]), past=done)
            for name, array in inputs.items():
                binding.bind_cpu_input(name, array)
            shape = _logits_shape(self.signature, len(new))
            if shape is None:
                binding.bind_output(logits.name, "cpu")
            elif found.shape != shape:
                found = np.empty(shape, found.dtype)
                binding.bind_output(logits.name, "cpu", 0, found.dtype, shape, found.ctypes.data)
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise _refused(inputs, error) from error
            # Asking for the results takes a tenth of a millisecond: not where all of them are buffers of ours.
            results = [] if self._shared and shape is not None else binding.get_outputs()
            token = choose(found if shape is not None else results[-1].numpy())
            if token in stop:
                return
            yield token
            done += len(new)
            new = [token]
            if not self._shared:
                for (past, present), cache in zip(pairs, results[: len(pairs)], strict=True):
                    binding.bind_ortvalue_input(past.name, cache)
                    binding.bind_output(present.name, "cpu")


def _logits_shape(signature: Signature, length: int) -> tuple[int, ...] | None:
    """The shape of the logits of `length` tokens of one text, or None if the signature does not say."""
    logits, tokens = signature.output("logits"), signature.input("tokens")
    assert logits is not None
    assert tokens is not None
    known = dict(zip(tokens.shape, (1, length), strict=False))
    shape = tuple(d if isinstance(d, int) else known.get(d) for d in logits.shape)
    return None if None in known or None in shape else shape  # type: ignore[return-value]


def _refused(inputs: Mapping[str, np.ndarray], error: Exception) -> InputError:
    shapes = ", ".join(f"{k} {list(np.shape(v))}" for k, v in inputs.items() if not isinstance(v, list)) or "lists"
    return InputError(f"ONNX Runtime cannot run the model on {shapes}: {describe(error)}. Check the values and shapes.")

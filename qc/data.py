"""The data of a compile: what statistics are collected on, and what the artifact is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qc.backends.decoding import context_limit, decoder_start
from qc.backends.evaluate import WINDOW
from qc.backends.inputs import text_batches, text_inputs
from qc.backends.reference import ModelRunner
from qc.backends.target import Runner
from qc.backends.tokenizer import stop_tokens
from qc.calibration import holds_arrays, read_batches
from qc.documents import Documents, read_documents, require_vocabulary
from qc.ir.errors import InputError
from qc.ir.model import Model, Signature
from qc.passes.base import CALIBRATION_TOKENS
from qc.plan import Plan, evaluation_windows

__all__ = ["Data", "batches_to_measure", "fitted", "read_data", "shortened"]

_MOST_BATCHES, _MEASURED_BATCHES = 128, 32
"""Batches of arrays to calibrate and to measure on."""

_LONGEST = 2048
"""Token ids of one text: the memory of attention grows with the square of its length."""

_MOST_TEXTS = 256
"""Texts to calibrate on, and as many to measure on: several thousand tokens each."""

_MOST_ANSWERED, _LONGEST_ANSWER = 32, 64
"""The same where the float model has to say what its decoder reads, and at most so many tokens: a run for each."""

_SIMULATED_WINDOWS, _SIMULATED_ROWS = 1, 4
"""What is measured in a simulator of the hardware, where a layer takes a tenth of a second or more."""

_ALONG_TEXT = frozenset({"tokens", "mask", "positions", "token_types", "decoder_tokens", "decoder_mask"})
"""Roles of inputs whose last axis is the text."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a compile calibrates and measures on.

    Attributes:
        name: Where it comes from, for the report.
        tokens: Token ids of the part of a text to measure a decoder on; None for other models.
        batches: Inputs to measure any other model on; None: the probe.
        calibration: Batches to collect statistics on; None: synthetic ones.
    """

    name: str
    tokens: Sequence[int] | None = None
    batches: Sequence[Mapping[str, np.ndarray]] | None = None
    calibration: Sequence[Mapping[str, np.ndarray]] | None = None


def read_data(
    model: Model,
    calib: str | Path | Mapping[str, object] | Iterable[Mapping[str, object]] | None,
    *,
    samples: int | None = None,
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
) -> Data:
    """Finds the data for `model`: the end of a text calibrates, its beginning measures, and they do not overlap.

    A decoder reads the whole text in windows, other models each line. Of several texts, half of them, chosen by `seed`,
    calibrate and the others measure (see `qc.documents`), of several arrays or images a part (see `qc.calibration`).

    Args:
        model: The model.
        calib: A file, a directory, or inputs by name; None for the sample text that travels with the model, or random
            data.
        samples: Windows, texts or batches to calibrate on at most; None for as many windows as hold `tokens`.
        tokens: How many tokens of a continuous text the statistics want.
        seed: Of the choice among more of them.

    Raises:
        InputError: If the data are missing, unreadable, or do not fit the model.
    """
    decoder = model.signature.is_decoder
    if calib is not None and not isinstance(calib, (str, Path)):
        return _arrays(model, calib, "given inputs", samples or _MOST_BATCHES, seed)
    if not decoder and model.signature.input("tokens") is None and calib is None:
        return Data("random inputs")
    path = Path(calib) if calib is not None else _sample(model)
    if path is None and not decoder:
        return Data("random inputs")
    if path is None:
        return Data("random tokens", _random_tokens(model))
    if not path.exists():
        raise InputError(f"Expected calibration data at {path}, found none. Check --calib.")
    if holds_arrays(path, model.signature):
        return _arrays(model, path, path.name, samples or _MOST_BATCHES, seed)
    tokenizer = model.assets.get("tokenizer.json")
    documents = read_documents(
        path, model.signature, tokenizer.parent if tokenizer is not None else None, whole=decoder
    )
    require_vocabulary(model, "tokens", documents.ids, path)
    require_vocabulary(model, "decoder_tokens", documents.answers or (), path)
    if documents.continuous:
        return _windows(model, path, documents.ids[0], samples or -(-tokens // WINDOW))
    return _texts(model, path, documents, samples, seed)


def batches_to_measure(runner: Runner, documents: Documents, directory: Path) -> list[dict[str, np.ndarray]]:
    """The inputs on which a model that is no decoder is measured on texts, cut to its context.

    Args:
        runner: The model, or the one that says what an encoder-decoder should answer where `documents` do not.
        documents: The texts.
        directory: Holds the configuration files.
    """
    documents = documents.part(range(len(documents.ids)), _longest(runner.provenance))
    if documents.answers is None and runner.signature.input("decoder_tokens") is not None:
        documents = _answered(runner, documents, stop_tokens(directory))
    return _batches(runner.signature, runner.provenance, documents)


def fitted(data: Data, signature: Signature, longest: int) -> Data:
    """The same data with texts to measure on that are cut to `longest` tokens."""
    if data.batches is None:
        return data
    along = {p.name for p in signature.inputs if p.role in _ALONG_TEXT}
    batches = [{k: v[..., :longest] if k in along else v for k, v in b.items()} for b in data.batches]
    return dataclasses.replace(data, batches=batches)


def shortened(data: Data, signature: Signature, plan: Plan) -> Data:
    """The same data with so little to measure on that a simulator comes to an end: a window, or 4 rows."""
    if data.tokens is not None:
        window, _ = evaluation_windows(plan.parameters)
        return dataclasses.replace(data, tokens=data.tokens[: _SIMULATED_WINDOWS * window])
    if data.batches is None:
        return data
    rows = [row for batch in data.batches for row in _rows(batch, signature)]
    step = max(1, len(rows) // _SIMULATED_ROWS)
    return dataclasses.replace(data, batches=rows[::step][:_SIMULATED_ROWS])


def _rows(batch: Mapping[str, np.ndarray], signature: Signature) -> list[Mapping[str, np.ndarray]]:
    """The rows of a batch, where all inputs have a first axis of one open size."""
    free = all(p.kind == "tensor" and p.shape and not isinstance(p.shape[0], int) for p in signature.inputs)
    counts = {np.shape(value)[:1] for value in batch.values()} if free else set()
    if len(counts) != 1 or () in counts:
        return [batch]
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(*counts.pop())]


def _sample(model: Model) -> Path | None:
    """The text that travels with the model, unless its decoder would have to read what nobody can tell."""
    paired = model.signature.input("decoder_tokens") is not None
    tells = model.signature.generates and "decoder_start" in model.provenance
    return None if paired and not tells else model.assets.get("sample.txt")


def _random_tokens(model: Model) -> list[int]:
    bound = int(model.provenance.get("vocab_size", 0)) or 256
    return np.random.default_rng(0).integers(0, bound, 4 * WINDOW).tolist()


def _arrays(
    model: Model, source: Path | Mapping[str, object] | Iterable[Mapping[str, object]], name: str, most: int, seed: int
) -> Data:
    """Of several samples, up to half measure; one sample, and samples for a decoder, only calibrate."""
    batches = read_batches(source, model, most + _MEASURED_BATCHES, seed)
    count = min(_MEASURED_BATCHES, len(batches) // 2)
    if count and not model.signature.is_decoder:
        order = np.random.default_rng([seed, len(batches)]).permutation(len(batches)).tolist()
        measured, calibration = ([batches[i] for i in sorted(part)] for part in (order[:count], order[count:]))
        return Data(name, batches=measured, calibration=calibration[:most])
    other = read_data(model, None)
    return dataclasses.replace(other, name=f"{other.name}, calibrated on {name}", calibration=batches[:most])


def _texts(model: Model, path: Path, documents: Documents, samples: int | None, seed: int) -> Data:
    """Texts that have nothing to do with each other, cut to the model's context."""
    signature, provenance = model.signature, model.provenance
    own = signature.input("decoder_tokens") is not None and documents.answers is None
    count = min(samples or (_MOST_ANSWERED if own else _MOST_TEXTS), len(documents.ids) // 2)
    if not count:
        raise InputError(
            f"Expected at least 2 {documents.unit} in {path}, to calibrate on one and measure on another; found 1."
        )
    order = list(range(len(documents.ids)))
    if documents.unordered:
        order = np.random.default_rng([seed, len(order)]).permutation(order).tolist()
    others, calibration = (documents.part(part, _longest(provenance)) for part in (order[:-count], order[-count:]))
    if signature.is_decoder:
        tokens = [i for text in others.ids for i in text]
        return Data(path.name, tokens, calibration=text_batches(signature, calibration.ids))
    measured, name = others.part(range(count)), path.name
    if own:
        config = model.assets.get("config.json")
        runner, ends = ModelRunner(model), stop_tokens(config.parent) if config is not None else ()
        measured, calibration = (_answered(runner, part, ends) for part in (measured, calibration))
        name += ", answered by the float model"
    batches = _batches(signature, provenance, measured)
    return Data(name, batches=batches, calibration=_batches(signature, provenance, calibration, to_the_end=False))


def _batches(
    signature: Signature, provenance: Mapping[str, str], documents: Documents, *, to_the_end: bool = True
) -> list[dict[str, np.ndarray]]:
    """Inputs for texts; the decoder of an encoder-decoder reads the token that starts it, then the answer.

    If it reads that `to_the_end`, the last token of the answer counts in a perplexity; the model itself stops there and
    never reads it.
    """
    if signature.input("decoder_tokens") is None:
        return text_batches(signature, documents.ids)
    start, longest = decoder_start(provenance), _longest(provenance)
    read = [[start, *answer][:longest] for answer in documents.answers or ()]
    return text_batches(signature, documents.ids, read if to_the_end else [r[:-1] for r in read])


def _answered(runner: Runner, documents: Documents, ends: Sequence[int]) -> Documents:
    """The same texts with what the model says to each, greedily, and the token that ends it."""
    if not runner.signature.generates:
        raise InputError(
            "Expected target (a string) or labels (a list of integers) beside each text for the decoder to read, found "
            "none; this model generates no text, so that it cannot answer itself. Give them as JSON lines."
        )
    answers = []
    for text in documents.ids:
        answer = list(runner.generate(text, _LONGEST_ANSWER, ends))
        answers.append([*answer, *ends[:1]] if len(answer) < _LONGEST_ANSWER else answer)
    return dataclasses.replace(documents, answers=answers)


def _longest(provenance: Mapping[str, str]) -> int:
    return min(context_limit(provenance) or _LONGEST, _LONGEST)


def _windows(model: Model, path: Path, tokens: Sequence[int], most: int) -> Data:
    """A text as windows of consecutive tokens."""
    # A short text still gives each side something: half of its windows, down to windows of half the text.
    window = min(WINDOW, len(tokens) // 2, context_limit(model.provenance) or WINDOW)
    if window < 2:
        raise InputError(f"Expected at least 4 tokens of text in {path}, found {len(tokens)}. Give a longer text.")
    count = min(most, len(tokens) // window // 2)
    rows = np.array(tokens[-count * window :], np.int64).reshape(count, 1, window)
    signature = model.signature
    batches = [text_inputs(signature, row) for row in rows]
    return Data(path.name, tokens[: -count * window], calibration=batches)

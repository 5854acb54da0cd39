"""Calibration data from what people have: text, JSON lines, token ids, arrays, images, or any iterable of inputs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qc.backends.evaluate import WINDOW
from qc.backends.inputs import check_inputs, text_inputs
from qc.backends.tokenizer import Tokenizer
from qc.ir.errors import InputError
from qc.ir.model import Model, Port, Signature
from qc.ir.probe import index_bound

__all__ = ["Documents", "read_batches", "read_documents"]

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_ARRAYS = frozenset({".npz", ".npy"})
_IMAGE_SIZE = 224
"""Height and width where neither the model nor its preprocessor says: what most classifiers were trained on."""

_IDS = ("input_ids", "tokens")
_MADE = frozenset({"tokens", "mask", "positions", "token_types", "past_key", "past_value"})
"""Roles of inputs that follow from token ids."""

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts as token ids.

    Attributes:
        ids: One list for each; none is empty.
        continuous: Whether they are one text that was cut anywhere, so that windows may be cut from it too.
    """

    ids: Sequence[Sequence[int]]
    continuous: bool = False


def read_documents(path: Path, model: Model) -> Documents | None:
    """Reads a file of texts or token ids; None if it is something else, see `read_batches`.

    * ``.jsonl``: an object a line with ``text``, or ``messages`` (whose contents are joined by blank lines), or token
      ids under ``input_ids`` or ``tokens``. Empty ones are left out, and texts for decoders cut to a window;
    * ``.npy``: integers, one text ``[T]`` or one a row ``[N, T]``, for models that take tokens;
    * any other file is UTF-8 text: one text for decoders, a sentence a line for encoders.

    Raises:
        InputError: If the file is not what its name says, or holds no text.
    """
    if path.is_dir() or path.suffix in _IMAGES or path.suffix == ".npz":
        return None
    if path.suffix == ".npy":
        if model.signature.input("tokens") is None:
            return None
        array = _loaded(path)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise InputError(
                f"Expected token ids in {path}, integers of shape [T] or [N, T]; found {array.dtype} "
                f"{list(array.shape)}. Give other inputs by name, in an .npz file."
            )
        return _require_some(path, np.atleast_2d(array).tolist(), model, continuous=array.ndim == 1)
    if model.signature.input("tokens") is None:
        raise InputError(
            f"Expected arrays or images to calibrate a model that takes no tokens on, found {path.name}. "
            "Give an .npz file, or a directory of .npz files or images."
        )
    tokenizer = _tokenizer(path, model)
    if path.suffix == ".jsonl":
        window = WINDOW if model.signature.is_decoder else None
        return _require_some(path, [_ids(path, *line, tokenizer, window) for line in _lines(path)], model)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {path}, found other bytes ({error}).") from error
    if model.signature.is_decoder:
        return _require_some(path, [_encoded(tokenizer, text)], model, continuous=True)
    return _require_some(path, [tokenizer.encode_sentence(line) for line in text.splitlines() if line.strip()], model)


def read_batches(source: Path | Iterable[Mapping[str, object]], model: Model, most: int, seed: int) -> list[Batch]:
    """Reads inputs as arrays.

    * an ``.npz`` file: one batch, arrays by input name; an ``.npy`` file: one batch of the model's only input;
    * an image: resized and normalized as ``preprocessor_config.json`` says;
    * a directory: its files of these kinds, in the order of their names;
    * any iterable of inputs by name.

    Args:
        source: One of these.
        model: The model that takes them.
        most: Number of batches to keep; the choice is made by `seed`, their order stays.
        seed: See there.

    Raises:
        InputError: If something does not fit the model, or is NaN; or there is nothing.
    """
    named = enumerate(source) if not isinstance(source, Path) else ((p.name, p) for p in _files(source))
    items = _sampled(list(named), most, seed)
    batches = []
    for name, item in items:
        values = _read(item, model) if isinstance(item, Path) else item
        if not isinstance(values, Mapping):
            raise InputError(f"Expected inputs by name as calibration sample {name}, found {type(values).__name__}.")
        try:
            batch = check_inputs(model.signature, _completed(model.signature, values))
        except InputError as error:
            raise InputError(f"Calibration sample {name}: {error}") from error
        if any(v is not None and 0 in np.shape(v) for k, v in batch.items() if not _is_cache(model, k)):
            continue  # an empty sample says nothing
        _require_finite(str(name), batch)
        batches.append(batch)
    if not batches:
        place = source if isinstance(source, Path) else "the data"
        raise InputError(f"Expected calibration samples in {place}, found none. Give at least one that is not empty.")
    return batches


def _is_cache(model: Model, name: str) -> bool:
    return any(p.name == name and p.role.startswith("past_") for p in model.signature.inputs)


def _require_finite(name: str, batch: Mapping[str, np.ndarray]) -> None:
    for key, value in batch.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isnan(value).any():
            raise InputError(f"Expected numbers in calibration sample {name}, found NaN in {key!r}. Leave it out.")


def _sampled(items: Sequence[tuple[object, object]], most: int, seed: int) -> list[tuple[object, object]]:
    if len(items) <= most:
        return list(items)
    chosen = np.random.default_rng([seed, len(items)]).choice(len(items), most, replace=False)
    return [items[i] for i in sorted(chosen.tolist())]


def _completed(signature: Signature, given: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Arrays in the model's width of their kind of number; what follows from token ids may be left out."""
    ports = {p.name: p for p in signature.inputs}
    arrays = {}
    for name, value in given.items():
        array = np.asarray(value)
        wanted = ports[name].dtype.numpy() if name in ports else array.dtype
        alike = any(array.dtype.kind in kinds and wanted.kind in kinds for kinds in ("f", "iu"))
        arrays[name] = array.astype(wanted, copy=False) if alike else array
    port = signature.input("tokens")
    if port is None or port.name not in arrays or arrays[port.name].ndim != 2:
        return arrays
    known = Signature(tuple(p for p in signature.inputs if p.role in _MADE), ())
    return text_inputs(known, arrays[port.name]) | arrays


def _require_some(path: Path, texts: Sequence[Sequence[int]], model: Model, *, continuous: bool = False) -> Documents:
    found = [t for t in texts if len(t)]
    if not found:
        raise InputError(f"Expected text in {path}, found none. Give another file to --calib.")
    port = model.signature.input("tokens")
    bound = index_bound(model, port.name) if port is not None else None
    for text in found:
        least, largest = min(text), max(text)
        if least < 0 or (bound is not None and largest >= bound):
            raise InputError(
                f"Expected token ids from 0 to {bound - 1 if bound is not None else 'the size of the vocabulary'} in "
                f"{path}, found {least if least < 0 else largest}. Was it made with another tokenizer?"
            )
    return Documents(found, continuous)


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text of white space nothing is left, not even what a tokenizer puts at the beginning of each."""
    return tokenizer.encode(text) if text.strip() else []


def _tokenizer(path: Path, model: Model) -> Tokenizer:
    file = model.assets.get("tokenizer.json")
    if file is None:
        raise InputError(f"Expected a tokenizer.json beside the model to read {path} with, found none.")
    return Tokenizer(file.parent)


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"Expected JSON in line {number} of {path}, found {line[:40]!r} ({error}).") from error
            if not isinstance(record, dict):
                raise InputError(f"Expected an object in line {number} of {path}, found {line[:40]!r}.")
            yield number, record


def _ids(path: Path, number: int, record: Mapping[str, object], tokenizer: Tokenizer, window: int | None) -> list[int]:
    ids = next((record[k] for k in _IDS if k in record), None)
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return ids
    messages, text = record.get("messages"), record.get("text")
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        text = "\n\n".join(filter(None, (_content(m.get("content")) for m in messages)))
    if isinstance(text, str):
        return _encoded(tokenizer, text)[:window]
    found = ", ".join(f"{key} ({type(value).__name__})" for key, value in record.items())
    raise InputError(
        f"Expected text (a string), messages (a list of objects with content) or input_ids (a list of integers) in "
        f"line {number} of {path}, found {found or 'nothing'}."
    )


def _content(content: object) -> str:
    """The text of a message, which may come in parts; other parts, and messages without text, say nothing here."""
    if isinstance(content, list):
        return "".join(_content(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGES | _ARRAYS)


def _read(path: Path, model: Model) -> Mapping[str, object]:
    if path.suffix.lower() in _IMAGES:
        port = model.signature.input("pixels")
        if port is None:
            raise InputError(f"Expected a model that takes images to calibrate on {path.name}, found none.")
        return {port.name: _image(path, port, model)}
    loaded = _loaded(path)
    if path.suffix == ".npz":
        return {name: loaded[name] for name in loaded.files}
    ports = model.signature.inputs
    if len(ports) != 1:
        names = ", ".join(p.name for p in ports)
        raise InputError(f"Expected an .npz file with {names}, as the model has several inputs; found {path.name}.")
    missing = len(ports[0].shape) == loaded.ndim + 1
    return {ports[0].name: loaded[None] if missing else loaded}


def _loaded(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not one of numpy's"
        raise InputError(f"Expected arrays in {path}, found a file that cannot be read: {reason}.") from error


def _image(path: Path, port: Port, model: Model) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("Reading images needs Pillow: pip install pillow.") from error
    file = model.assets.get("preprocessor_config.json")
    config = json.loads(file.read_text("utf-8")) if file is not None else {}
    size = config.get("crop_size") or config.get("size") or {}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    wanted = [d if isinstance(d, int) else size.get(k, size.get("shortest_edge", _IMAGE_SIZE))
              for k, d in zip(("height", "width"), port.shape[-2:], strict=True)]  # fmt: skip
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((wanted[1], wanted[0]), Image.Resampling.BILINEAR))
    except OSError as error:
        raise InputError(f"Expected an image in {path}, found a file that Pillow cannot read ({error}).") from error
    scaled = pixels.astype(np.float32) * np.float32(config.get("rescale_factor", 1 / 255))
    mean, deviation = (np.array(config.get(k, d), np.float32) for k, d in (("image_mean", 0.0), ("image_std", 1.0)))
    return ((scaled - mean) / deviation).transpose(2, 0, 1)[None].astype(port.dtype.numpy())

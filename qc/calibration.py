"""Calibration data from what people have: text, JSON lines, token ids, arrays, images, or any iterable of inputs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qc.backends.evaluate import WINDOW
from qc.backends.inputs import check_inputs
from qc.backends.tokenizer import Tokenizer
from qc.ir.errors import InputError
from qc.ir.model import Model, Port

__all__ = ["Documents", "read_batches", "read_documents"]

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_ARRAYS = frozenset({".npz", ".npy"})
_IMAGE_SIZE = 224
"""Height and width where neither the model nor its preprocessor says: what most classifiers were trained on."""

_IDS = ("input_ids", "tokens")

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
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or model.signature.input("tokens") is None:
            return None
        return _require_some(path, np.atleast_2d(array).tolist(), continuous=array.ndim == 1)
    tokenizer = _tokenizer(path, model)
    if path.suffix == ".jsonl":
        window = WINDOW if model.signature.is_decoder else None
        return _require_some(path, [_ids(path, *line, tokenizer, window) for line in _lines(path)])
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {path}, found other bytes ({error}).") from error
    if model.signature.is_decoder:
        return _require_some(path, [tokenizer.encode(text)], continuous=True)
    return _require_some(path, [tokenizer.encode_sentence(line) for line in text.splitlines() if line.strip()])


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
            batch = check_inputs(model.signature, {k: np.asarray(v) for k, v in values.items()})
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


def _require_some(path: Path, texts: Sequence[Sequence[int]], *, continuous: bool = False) -> Documents:
    found = [t for t in texts if len(t)]
    if not found:
        raise InputError(f"Expected text in {path}, found none. Give another file to --calib.")
    return Documents(found, continuous)


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
    if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
        return ids
    messages = record.get("messages")
    text = record.get("text")
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        text = "\n\n".join(m["content"] for m in messages)
    if isinstance(text, str):
        return tokenizer.encode(text)[:window]
    raise InputError(
        f"Expected text, messages or input_ids in line {number} of {path}, found {', '.join(record) or 'nothing'}."
    )


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
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"Expected arrays in {path}, found a file that numpy cannot read ({error}).") from error
    if path.suffix == ".npz":
        return {name: loaded[name] for name in loaded.files}
    ports = model.signature.inputs
    if len(ports) != 1:
        names = ", ".join(p.name for p in ports)
        raise InputError(f"Expected an .npz file with {names}, as the model has several inputs; found {path.name}.")
    missing = len(ports[0].shape) == loaded.ndim + 1
    return {ports[0].name: loaded[None] if missing else loaded}


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

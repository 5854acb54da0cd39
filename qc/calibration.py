"""Calibration data as arrays: files of them, images, or any iterable of inputs. Texts are read by `qc.documents`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qc.arrays import read_array, read_arrays
from qc.backends.inputs import check_inputs, text_inputs
from qc.documents import require_vocabulary
from qc.ir.errors import InputError
from qc.ir.model import ANY_SHAPE, Model, Port, Signature

__all__ = ["holds_arrays", "read_batches"]

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
_ARRAYS = frozenset({".npz", ".npy"})
_IMAGE_SIZE = 224
"""Height and width where neither the model nor its preprocessor says: what most classifiers were trained on."""

_MADE = frozenset({"tokens", "mask", "positions", "token_types", "past_key", "past_value"})
"""Roles of inputs that follow from token ids."""

Batch = dict[str, np.ndarray]


def holds_arrays(path: Path, signature: Signature) -> bool:
    """Whether `read_batches` reads a file, and not `qc.documents`: arrays, images, or a folder of them."""
    suffix = path.suffix.lower()
    ids = suffix == ".npy" and signature.input("tokens") is not None
    return path.is_dir() or (suffix in _IMAGES | _ARRAYS and not ids)


def read_batches(
    source: Path | Mapping[str, object] | Iterable[Mapping[str, object]], model: Model, most: int, seed: int
) -> list[Batch]:
    """Reads inputs as arrays.

    * an ``.npz`` file: one batch, arrays by input name; an ``.npy`` file: one batch of the model's only input;
    * an image: resized and normalized as ``preprocessor_config.json`` says;
    * a directory: its files of these kinds, in the order of their names;
    * inputs by name, or any iterable of them.

    Args:
        source: One of these.
        model: The model that takes them.
        most: Number of batches to keep; the choice is made by `seed`, their order stays.
        seed: See there.

    Raises:
        InputError: If something does not fit the model, or is NaN; or there is nothing.
    """
    source = [source] if isinstance(source, Mapping) else source
    named = enumerate(source) if not isinstance(source, Path) else ((p.name, p) for p in _files(source))
    items = _sampled(list(named), most, seed)
    batches = []
    for name, item in items:
        values = _read(item, model) if isinstance(item, Path) else item
        if not isinstance(values, Mapping):
            raise InputError(
                f"Expected arrays by the names of inputs as calibration sample {name}, found {type(values).__name__}. "
                "Write texts to a file, and give its path."
            )
        try:
            batch = check_inputs(model.signature, _completed(model.signature, values))
        except InputError as error:
            raise InputError(f"Calibration sample {name}: {error}") from error
        if any(v is not None and 0 in np.shape(v) for k, v in batch.items() if not _is_cache(model, k)):
            continue  # an empty sample says nothing
        _require_finite(str(name), batch)
        for port in model.signature.inputs:
            if port.role in ("tokens", "decoder_tokens"):
                require_vocabulary(model, port.role, [batch[port.name]], f"calibration sample {name}")
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
    """Arrays in the model's width of their kind of number, in a batch of one if they have no axis for it.

    What follows from token ids may be left out.
    """
    ports = {p.name: p for p in signature.inputs}
    arrays = {}
    for name, value in given.items():
        array = np.asarray(value)
        if name in ports and ports[name].shape != ANY_SHAPE and len(ports[name].shape) == array.ndim + 1:
            array = array[None]
        wanted = ports[name].dtype.numpy() if name in ports else array.dtype
        alike = any(array.dtype.kind in kinds and wanted.kind in kinds for kinds in ("f", "iu"))
        arrays[name] = array.astype(wanted, copy=False) if alike else array
    port = signature.input("tokens")
    if port is None or port.name not in arrays or arrays[port.name].ndim != 2:
        return arrays
    decoder = signature.input("decoder_tokens")
    read = arrays.get(decoder.name) if decoder is not None else None
    made = _MADE if read is None else _MADE | {"decoder_tokens", "decoder_mask"}
    known = Signature(tuple(p for p in signature.inputs if p.role in made), ())
    return text_inputs(known, arrays[port.name], decoder=read) | arrays


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.iterdir())
    files = [p for p in found if p.suffix.lower() in _IMAGES | _ARRAYS]
    if not files:
        raise InputError(
            f"Expected .npz or .npy files or images in {path}, found "
            f"{', '.join(p.name for p in found[:5]) or 'nothing'}. A text is given as a file."
        )
    return files


def _read(path: Path, model: Model) -> Mapping[str, object]:
    if path.suffix.lower() in _IMAGES:
        port = model.signature.input("pixels")
        if port is None:
            raise InputError(f"Expected a model that takes images to calibrate on {path.name}, found none.")
        return {port.name: _image(path, port, model)}
    if path.suffix.lower() == ".npz":
        return read_arrays(path)
    ports = model.signature.inputs
    if len(ports) != 1:
        names = ", ".join(p.name for p in ports)
        raise InputError(f"Expected an .npz file with {names}, as the model has several inputs; found {path.name}.")
    return {ports[0].name: read_array(path)}


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

"""Arrays in ``.npz`` and ``.npy`` files: read without pickles, written complete or not at all."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qc.ir.errors import InputError

__all__ = ["read_array", "read_arrays", "write_arrays"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an ``.npz`` file.

    Raises:
        InputError: If it is missing, damaged, or holds pickled objects, which are never loaded.
    """
    if not path.is_file():
        raise InputError(f"Expected an .npz file at {path}, found none. Write one with numpy.savez.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise InputError(
                f"Expected arrays by input name in {path} (numpy.savez), found a single array without a name."
            )
        with loaded as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"Expected an .npz file of plain arrays at {path}, found one that cannot be read ({error}). Write it with "
            "numpy.savez; text arrays need a string type, not object."
        ) from error


def read_array(path: Path) -> np.ndarray:
    """Maps the array of an ``.npy`` file.

    Raises:
        InputError: If it is none.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not one of numpy's"
        raise InputError(f"Expected an array in {path}, found a file that cannot be read: {reason}.") from error
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"Expected an array in {path} (numpy.save), found arrays by name. Call the file .npz.")
    return loaded


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an ``.npz`` file; what stood at `path` stays until all is written.

    Raises:
        InputError: If the place is not writable.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose another --output.") from error
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w") as archive:
            for key, array in arrays.items():  # numpy.savez takes names as keywords, of which some are its own
                plain = array.astype(str) if array.dtype == object else array
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, plain, allow_pickle=False)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

"""A library of another architecture, in an emulator: a small program around it that takes commands through a pipe."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qc.backends.tvm.host import template
from qc.backends.tvm.local import Draws
from qc.backends.tvm.toolchain import run_tool
from qc.ir.errors import InternalError, UnsupportedError

__all__ = ["RemoteLibrary"]


class RemoteLibrary:
    """The same functions as `LocalLibrary`, in a process of its own."""

    def __init__(
        self, directory: Path, library: Path, dimensions: int, cc: str, emulator: Sequence[str], package: str
    ) -> None:
        if shutil.which(emulator[0]) is None:
            raise UnsupportedError(
                f"Expected the emulator {emulator[0]} to run a library for another processor, found none. Install it "
                f"({package})."
            )
        self._dimensions = dimensions
        self._work = Path(tempfile.mkdtemp())
        header = (directory / "model.h").read_text("utf-8")
        has = [f"-D{part}" for part, name in (("CACHES", "qc_cache("), ("DECODER", "qc_feed(")) if name in header]
        (self._work / "driver.c").write_text(template("driver.c"), "utf-8")
        program = self._work / "driver"
        command = [cc, "-O1", "-static", *has, "-I", str(directory.resolve()), "driver.c", str(library.resolve())]
        run_tool([*command, "-lm", "-lpthread", "-o", str(program)], self._work, package)
        self._process = subprocess.Popen(  # noqa: S603
            [*emulator, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.stdin.close()
            process.wait()
            process.stdout.close()
        if getattr(self, "_work", None) is not None:
            shutil.rmtree(self._work)

    def open(self, weights: Path) -> int:
        """Maps and checks the weights."""
        name = str(weights.resolve()).encode()
        self._send(b"o", struct.pack("<q", len(name)), name)
        return self._integer()

    def default_limits(self) -> list[int]:
        """The limits of an instance that nothing is said about."""
        self._send(b"d")
        return list(struct.unpack(f"<{self._dimensions}q", self._read(8 * self._dimensions)))

    def create(self, limits: Sequence[int], threads: int) -> int:
        """Makes the instance anew."""
        self._send(b"c", _numbers(limits), struct.pack("<q", threads))
        return self._integer()

    def output_shape(self, index: int, dims: Sequence[int]) -> tuple[int, ...]:
        """The shape of an output."""
        self._send(b"s", struct.pack("<q", index), _numbers(dims))
        rank = self._integer()
        return tuple(max(n, 0) for n in struct.unpack(f"<{rank}q", self._read(8 * rank)))  # as `LocalLibrary`

    def run(self, dims: Sequence[int], inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> int:
        """Runs once, on arrays without gaps."""
        self._send(b"r", _numbers(dims), struct.pack("<2q", len(inputs), len(outputs)))
        for array in inputs:
            self._send(struct.pack("<q", array.nbytes), array.tobytes())
        for array in outputs:
            self._send(struct.pack("<q", array.nbytes))
        code = self._integer()
        for array in outputs:
            array[...] = np.frombuffer(self._read(array.nbytes), array.dtype).reshape(array.shape)
        return code

    def write_cache(self, index: int, content: np.ndarray) -> None:
        """Puts rows ``[batch, heads, length, bytes]`` into a cache."""
        whole = self._whole(index)
        whole[: content.shape[0], :, : content.shape[2]] = content
        self._send(b"w", struct.pack("<q", index), whole.tobytes())

    def read_cache(self, index: int, batch: int, length: int) -> np.ndarray:
        """Takes rows ``[batch, heads, length, bytes]`` out of a cache."""
        return self._whole(index)[:batch, :, :length]

    def reset(self) -> int:
        """Forgets the text."""
        self._send(b"z")
        return self._integer()

    def feed(self, tokens: Sequence[int]) -> int:
        """Appends tokens."""
        self._send(b"f", struct.pack("<q", len(tokens)), _numbers(tokens))
        return self._integer()

    def sample(self, draws: Draws) -> tuple[int, int]:
        """A code and the next token."""
        self._send(b"n", bytes(draws))
        code, token = self._integer(), self._integer()
        ctypes.memmove(ctypes.byref(draws), self._read(ctypes.sizeof(Draws)), ctypes.sizeof(Draws))
        return code, token

    def error(self, code: int) -> str:
        """What a code means."""
        self._send(b"e", struct.pack("<q", code))
        return self._read(self._integer()).decode()

    def _whole(self, index: int) -> np.ndarray:
        self._send(b"k", struct.pack("<q", index))
        shape = struct.unpack("<4q", self._read(32))
        return np.frombuffer(self._read(int(np.prod(shape))), np.uint8).reshape(shape).copy()

    def _send(self, *parts: bytes) -> None:
        assert self._process.stdin is not None
        for part in parts:
            self._process.stdin.write(part)

    def _read(self, size: int) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.flush()
        found = self._process.stdout.read(size)
        if len(found) != size:
            raise InternalError(f"The library stopped in its emulator (exit code {self._process.wait()}).")
        return found

    def _integer(self) -> int:
        return struct.unpack("<q", self._read(8))[0]


def _numbers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *map(int, values))

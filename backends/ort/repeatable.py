"""ORT's format with the same bytes each time.

The runtime writes the table of kernel types (``KernelTypeStrResolver``) in the order of a hash table that is seeded
anew for each one; all else of a file is the same each time. Here that part is written again, in the order of its keys,
behind the end of the file, where the root refers to it, and the model moves up to where it stood.
"""

from __future__ import annotations

import mmap
import shutil
import struct
from pathlib import Path
from typing import Any

__all__ = ["make_repeatable"]

_VERSION, _MODEL, _RESOLVER = 4, 6, 10
"""Places of references in the list of the root's fields."""

_ALIGNED = 8
"""Bytes that a part may be moved by multiples of."""


def make_repeatable(file: Path) -> None:
    """Writes a file that the runtime has written anew; the runtime reads the same model from it."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    made = file.with_name(f"{file.name}.new")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as held:
        session = InferenceSession.GetRootAs(held, 0)
        resolver, model = session.KernelTypeStrResolver(), session.Model()._tab.Pos
        written, root = _written(resolver)
        head, rest = resolver._tab.Pos, min(model, _fields(held, model))  # the table stands between root and model
        moved = head + (rest - head) % _ALIGNED - rest
        size = len(held) + moved
        gap = -size % _ALIGNED
        start = bytearray(held[:head]) + bytes(rest + moved - head)
        for place in (_VERSION, _MODEL):
            _refer(start, session._tab, place, moved)
        field = session._tab.Pos + session._tab.Offset(_RESOLVER)
        struct.pack_into("<I", start, field, size + gap + root - field)
        with made.open("wb") as out:
            out.write(start)
            stream.seek(rest)
            shutil.copyfileobj(stream, out)
            out.write(bytes(gap) + written)
    made.replace(file)


def _refer(content: bytearray, table: Any, place: int, change: int) -> None:
    """Changes how far ahead a table refers."""
    at = table.Pos + table.Offset(place)
    struct.pack_into("<I", content, at, struct.unpack_from("<I", content, at)[0] + change)


def _written(resolver: Any) -> tuple[bytes, int]:
    """The table in a buffer of its own, and where it starts there."""
    import flatbuffers
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
        ArgTypeAndIndex,
        KernelTypeStrArgsEntry,
        KernelTypeStrResolver,
        OpIdKernelTypeStrArgsEntry,
    )

    build = flatbuffers.Builder(1 << 12)

    def argument(held: Any) -> int:
        ArgTypeAndIndex.ArgTypeAndIndexStart(build)
        ArgTypeAndIndex.ArgTypeAndIndexAddArgType(build, held.ArgType())
        ArgTypeAndIndex.ArgTypeAndIndexAddIndex(build, held.Index())
        return ArgTypeAndIndex.ArgTypeAndIndexEnd(build)

    def kernel_type(held: Any) -> int:
        made = _vector(build, [argument(held.Args(i)) for i in range(held.ArgsLength())])
        name = build.CreateString(held.KernelTypeStr())
        KernelTypeStrArgsEntry.KernelTypeStrArgsEntryStart(build)
        KernelTypeStrArgsEntry.KernelTypeStrArgsEntryAddKernelTypeStr(build, name)
        KernelTypeStrArgsEntry.KernelTypeStrArgsEntryAddArgs(build, made)
        return KernelTypeStrArgsEntry.KernelTypeStrArgsEntryEnd(build)

    def operator(held: Any) -> int:
        types = [held.KernelTypeStrArgs(i) for i in range(held.KernelTypeStrArgsLength())]
        made = _vector(build, [kernel_type(t) for t in sorted(types, key=lambda t: t.KernelTypeStr())])
        name = build.CreateString(held.OpId())
        OpIdKernelTypeStrArgsEntry.OpIdKernelTypeStrArgsEntryStart(build)
        OpIdKernelTypeStrArgsEntry.OpIdKernelTypeStrArgsEntryAddOpId(build, name)
        OpIdKernelTypeStrArgsEntry.OpIdKernelTypeStrArgsEntryAddKernelTypeStrArgs(build, made)
        return OpIdKernelTypeStrArgsEntry.OpIdKernelTypeStrArgsEntryEnd(build)

    held = [resolver.OpKernelTypeStrArgs(i) for i in range(resolver.OpKernelTypeStrArgsLength())]
    made = _vector(build, [operator(o) for o in sorted(held, key=lambda o: o.OpId())])
    KernelTypeStrResolver.KernelTypeStrResolverStart(build)
    KernelTypeStrResolver.KernelTypeStrResolverAddOpKernelTypeStrArgs(build, made)
    build.Finish(KernelTypeStrResolver.KernelTypeStrResolverEnd(build))
    written = bytes(build.Output())
    return written, struct.unpack_from("<I", written)[0]


def _vector(build: Any, places: list[int]) -> int:
    build.StartVector(4, len(places), 4)
    for place in reversed(places):
        build.PrependUOffsetTRelative(place)
    return build.EndVector()


def _fields(content: mmap.mmap, table: int) -> int:
    """Where the list of the fields of a table starts."""
    return table - struct.unpack_from("<i", content, table)[0]

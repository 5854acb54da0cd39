"""Kernels for iOS: Mach-O objects in a static library for each of device and simulator, and both as an XCFramework.

Nothing of Apple's tools is needed. A library is an archive in the form that Apple's linker takes: names of members
behind their headers (``#1/``), members aligned to 8 bytes, a sorted table of symbols (``__.SYMDEF SORTED``) in front.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from qc.ir.errors import InternalError

__all__ = ["FRAMEWORK", "TRIPLE", "archive", "for_simulator", "write_framework"]

TRIPLE = "arm64-apple-ios16.0"
"""LLVM's name of the system that kernels are compiled for."""

FRAMEWORK = "ios/QCKernels.xcframework"
"""Inside of the Swift package, which may refer to nothing outside of itself."""

_MAGIC, _BUILD_VERSION, _SYMTAB = 0xFEEDFACF, 0x32, 0x2
_DEVICE, _SIMULATOR = 2, 7
_DEBUG, _KIND, _SECTION, _EXTERNAL = 0xE0, 0x0E, 0x0E, 0x01
_TABLE = "__.SYMDEF SORTED"

_PLIST = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>AvailableLibraries</key>
  <array>
{libraries}
  </array>
  <key>CFBundlePackageType</key>
  <string>XFWK</string>
  <key>XCFrameworkFormatVersion</key>
  <string>1.0</string>
</dict>
</plist>
"""

_LIBRARY = """\
    <dict>
      <key>BinaryPath</key>
      <string>libqckernels.a</string>
      <key>LibraryIdentifier</key>
      <string>{place}</string>
      <key>LibraryPath</key>
      <string>libqckernels.a</string>
      <key>SupportedArchitectures</key>
      <array>
        <string>arm64</string>
      </array>
      <key>SupportedPlatform</key>
      <string>ios</string>{variant}
    </dict>"""

_VARIANT = "\n      <key>SupportedPlatformVariant</key>\n      <string>simulator</string>"


def write_framework(objects: Mapping[str, bytes], directory: Path) -> None:
    """Writes the objects as a library for devices and one for the simulator.

    Args:
        objects: The object file of each kernel, by name, compiled for `TRIPLE`.
        directory: Where the framework's folder goes.
    """
    simulated = {name: for_simulator(content) for name, content in objects.items()}
    places = {"ios-arm64": (objects, ""), "ios-arm64-simulator": (simulated, _VARIANT)}
    for place, (held, _) in places.items():
        (directory / FRAMEWORK / place).mkdir(parents=True)
        (directory / FRAMEWORK / place / "libqckernels.a").write_bytes(archive(held))
    libraries = "\n".join(_LIBRARY.format(place=p, variant=v) for p, (_, v) in places.items())
    (directory / FRAMEWORK / "Info.plist").write_text(_PLIST.format(libraries=libraries), "utf-8", newline="\n")


def for_simulator(content: bytes) -> bytes:
    """The object for the simulator on a Mac of the same architecture: the same code under another platform's name."""
    changed = bytearray(content)
    for command, at in _commands(content):
        if command == _BUILD_VERSION:
            struct.pack_into("<I", changed, at + 8, _SIMULATOR)
    return bytes(changed)


def archive(objects: Mapping[str, bytes]) -> bytes:
    """A static library of objects, the same bytes for the same objects."""
    names = [f"{name}.o" for name in sorted(objects)]
    held = [objects[name] for name in sorted(objects)]
    defined = sorted((s, i) for i, content in enumerate(held) for s in _defined(content))
    strings = b"".join(symbol.encode() + b"\0" for symbol, _ in defined)
    strings += bytes(-len(strings) % 8)
    size = 8 + 8 * len(defined) + len(strings)
    members = [_member(name, content) for name, content in zip(names, held, strict=True)]
    start, places = 8 + len(_member(_TABLE, bytes(size))), []
    for member in members:
        places.append(start)
        start += len(member)
    entries, at = [], 0
    for symbol, i in defined:
        entries.append(struct.pack("<II", at, places[i]))
        at += len(symbol.encode()) + 1
    table = struct.pack("<I", 8 * len(entries)) + b"".join(entries) + struct.pack("<I", len(strings)) + strings
    return b"!<arch>\n" + _member(_TABLE, table) + b"".join(members)


def _member(name: str, content: bytes) -> bytes:
    """A member with its header, which holds no time and no owner."""
    spelled = name.encode() + b"\0"
    spelled += bytes(-(60 + len(spelled)) % 8)
    padded = content + bytes(-len(content) % 8)
    header = f"#1/{len(spelled)}".ljust(16) + "0".ljust(12) + "0".ljust(6) + "0".ljust(6) + "100644".ljust(8)
    header += str(len(spelled) + len(padded)).ljust(10) + "`\n"
    return header.encode("ascii") + spelled + padded


def _commands(content: bytes) -> Iterator[tuple[int, int]]:
    """The load commands of an object, and where each starts."""
    magic, _, _, _, count, _, _, _ = struct.unpack_from("<8I", content)
    if magic != _MAGIC:
        raise InternalError(f"Expected a 64-bit Mach-O object, found one that starts with {magic:#x}.")
    at = 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", content, at)
        yield command, at
        at += size


def _defined(content: bytes) -> list[str]:
    """The symbols that an object defines for others."""
    at = next(at for command, at in _commands(content) if command == _SYMTAB)
    symbols, count, strings, _ = struct.unpack_from("<4I", content, at + 8)
    found = []
    for i in range(count):
        name, kind = struct.unpack_from("<IB", content, symbols + 16 * i)
        if kind & _EXTERNAL and not kind & _DEBUG and kind & _KIND == _SECTION:
            found.append(content[strings + name : content.index(b"\0", strings + name)].decode())
    return found

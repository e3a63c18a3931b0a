# SPDX-License-Identifier: Apache-2.0
"""Drop from a shared library the CUDA images that one device does not load.

A library embeds fatbin containers: a header of 16 bytes (magic, version, size of the header, size
of the body) and images behind it, each with a header of its own. Containers are shortened in place,
so that no offset of the ELF file changes; the zeros that are left compress to nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = struct.pack("<I", 0xBA55ED50)
HEADER_BYTES = 16
PTX, ELF = 1, 2


@dataclass(frozen=True)
class Image:
    """One image of a container.

    Attributes:
        kind: `PTX` or `ELF`; others exist and are never loaded here.
        arch: Compute capability, 90 for 9.0.
        data: Its header and its body.
    """

    kind: int
    arch: int
    data: bytes


@dataclass(frozen=True)
class Container:
    """A fatbin at an offset of the library; `num_bytes` is its body."""

    offset: int
    num_bytes: int
    images: tuple[Image, ...]


def containers(data: bytes | bytearray) -> Iterator[Container]:
    """Every container of a library. What looks like one and is none is passed over."""
    at = 0
    while (at := data.find(MAGIC, at)) >= 0:
        if at + HEADER_BYTES > len(data):
            return
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        if version != 1 or header != HEADER_BYTES or at + HEADER_BYTES + size > len(data):
            at += len(MAGIC)
            continue
        yield Container(at, size, tuple(_images(data, at + HEADER_BYTES, size)))
        at += HEADER_BYTES + size


def _images(data: bytes | bytearray, at: int, size: int) -> Iterator[Image]:
    end = at + size
    while at < end:
        kind, _, header, body = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        yield Image(kind, arch, bytes(data[at : at + header + body]))
        at += header + body


def keep_one_arch(data: bytearray, arch: int) -> int:
    """Leave in each container what a device of this capability loads; returns the bytes dropped.

    That is its machine code, else the newest PTX that it can compile. A container with neither gets
    some other's image, since the loader refuses an empty one; nothing in it can be called.

    Raises:
        ValueError: No container holds machine code for this capability.
    """
    found = list(containers(data))
    ours = [i for c in found for i in c.images if (i.kind, i.arch) == (ELF, arch)]
    if not ours:
        raise ValueError(f"no machine code for compute capability {arch} in this library")
    stand_in = min(ours, key=lambda image: len(image.data))
    dropped = 0
    for container in found:
        body = b"".join(image.data for image in _kept(container, arch, stand_in))
        dropped += container.num_bytes - len(body)
        struct.pack_into("<Q", data, container.offset + 8, len(body))
        begin = container.offset + HEADER_BYTES
        data[begin : begin + container.num_bytes] = body + bytes(container.num_bytes - len(body))
    return dropped


def _kept(container: Container, arch: int, stand_in: Image) -> list[Image]:
    code = [i for i in container.images if (i.kind, i.arch) == (ELF, arch)]
    source = [i for i in container.images if i.kind == PTX and i.arch <= arch]
    if code:
        return code
    if source:
        return [max(source, key=lambda image: image.arch)]
    if len(stand_in.data) <= container.num_bytes:
        return [stand_in]
    return [min(container.images, key=lambda image: len(image.data))]

# SPDX-License-Identifier: Apache-2.0
"""Images of other architectures leave a library; nothing else of it moves."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.fatbins import ELF, PTX, Image, containers, keep_one_arch

IMAGE_HEADER = 64
MAGIC = 0xBA55ED50


def image(kind: int, arch: int, body: bytes) -> Image:
    header = struct.pack("<HHIQ", kind, 0x101, IMAGE_HEADER, len(body))
    header += bytes(28 - len(header)) + struct.pack("<I", arch)
    return Image(kind, arch, header + bytes(IMAGE_HEADER - len(header)) + body)


def container(images: list[Image]) -> bytes:
    body = b"".join(each.data for each in images)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


images = st.builds(
    image,
    st.sampled_from((PTX, ELF)),
    st.sampled_from((70, 80, 90, 100)),
    st.binary(min_size=1, max_size=40),
)
OURS = image(ELF, 90, b"the smallest image for 90")


@given(st.lists(st.lists(images, min_size=1, max_size=5), max_size=4), st.binary(max_size=64))
def test_only_what_the_device_loads_stays(bins: list[list[Image]], between: bytes) -> None:
    between = between.replace(struct.pack("<I", MAGIC), b"")
    parts = [container([OURS]), *map(container, bins)]
    library = bytearray(between.join(parts))
    before, size = list(containers(library)), len(library)
    dropped = keep_one_arch(library, 90)
    assert len(library) == size
    left = 0
    for old, offset in zip(before, _offsets(parts, between), strict=True):
        assert old.offset == offset
        (num_bytes,) = struct.unpack_from("<Q", library, offset + 8)
        left += old.num_bytes - num_bytes
        kept = next(iter(containers(library[offset:]))).images
        assert kept
        wanted = [each for each in old.images if (each.kind, each.arch) == (ELF, 90)]
        source = [each for each in old.images if each.kind == PTX and each.arch <= 90]
        if wanted:
            assert list(kept) == wanted
        elif source:
            assert kept == (max(source, key=lambda each: each.arch),)
        assert not any(library[offset + 16 + num_bytes : offset + 16 + old.num_bytes])
    assert left == dropped


def _offsets(parts: list[bytes], between: bytes) -> list[int]:
    offsets, at = [], 0
    for part in parts:
        offsets.append(at)
        at += len(part) + len(between)
    return offsets


def test_a_library_for_other_devices_is_refused() -> None:
    library = bytearray(container([image(ELF, 80, b"x")]))
    with pytest.raises(ValueError, match="compute capability 90"):
        keep_one_arch(library, 90)


def test_what_only_looks_like_a_container_is_passed_over() -> None:
    library = bytearray(struct.pack("<I", MAGIC) * 3 + container([OURS]) + b"tail")
    assert [each.images for each in containers(library)] == [(OURS,)]
    assert keep_one_arch(library, 90) == 0

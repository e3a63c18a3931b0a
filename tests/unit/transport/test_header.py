# SPDX-License-Identifier: Apache-2.0
"""The label of a prompt: plain data there, the same label back."""

import json
import zlib
from array import array

import numpy as np
import pytest

from vllm_stateful.errors import StatefulError
from vllm_stateful.transport.header import (
    NO_VERSION,
    BaseMissError,
    ChecksumError,
    PromptHeader,
    checksum,
)

HEADERS = [
    PromptHeader("client", NO_VERSION),
    PromptHeader("client", 7),
    PromptHeader("client", 8, 7, 100_000, True, 2**32 - 1),
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_survives_json(header: PromptHeader) -> None:
    payload = json.loads(json.dumps(header.to_payload()))
    assert PromptHeader.from_payload(payload) == header


def test_a_header_says_nothing_about_a_parent_unless_told() -> None:
    header = PromptHeader("client", 7)
    assert (header.parent, header.num_parent_tokens) == (NO_VERSION, 0)
    assert not header.parent_ends
    assert header.checksum is None


@pytest.mark.parametrize("payload", [{"client": "c"}, {"client": "c", "version": 1, "wave": 2}])
def test_missing_and_unknown_fields_are_refused(payload: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        PromptHeader.from_payload(payload)


def test_the_checksum_is_the_crc_of_the_int32_bytes() -> None:
    ids = [0, 1, 2**31 - 1]
    expected = zlib.crc32(array("i", ids).tobytes())
    assert checksum(np.array(ids, np.int32)) == expected
    assert checksum(np.array([ids, ids], np.int32).T[:, 0]) == expected, "any memory layout"


def test_the_checksum_sees_a_changed_a_missing_and_a_moved_token() -> None:
    ids = [[1, 2, 3], [1, 2, 4], [1, 2], [2, 1, 3], []]
    assert len({checksum(np.array(some, np.int32)) for some in ids}) == len(ids)


def test_errors_are_in_the_plugins_tree_and_a_miss_is_not_a_mismatch() -> None:
    assert issubclass(BaseMissError, StatefulError)
    assert issubclass(ChecksumError, StatefulError)
    assert not issubclass(ChecksumError, BaseMissError)

# SPDX-License-Identifier: Apache-2.0
"""Prompts that an engine core remembers, and what it makes of the next message."""

import numpy as np
import pytest

from vllm_stateful.transport.bases import BYTES_PER_HASH, BYTES_PER_TOKEN, Base, BaseStore
from vllm_stateful.transport.header import (
    NO_VERSION,
    BaseMissError,
    ChecksumError,
    PromptHeader,
    checksum,
)

FIRST = PromptHeader("client", 1)


def base(ids: list[int], num_hashes: int = 0) -> Base:
    return Base(tuple(ids), np.array(ids, np.int32), None, (b"hash",) * num_hashes)


def receive(store: BaseStore, header: PromptHeader, ids: list[int]) -> list[int]:
    """Rebuild and remember, as the receiver does."""
    made = store.rebuild(header, ids)
    assert made.array.dtype == np.int32
    assert made.array.tolist() == made.token_ids
    store.keep(header, base(made.token_ids))
    return made.token_ids


@pytest.fixture
def store() -> BaseStore:
    """Holds 1, 2, 3, 4 as the client's first version."""
    store = BaseStore(10_000, vocab_size=100)
    receive(store, FIRST, [1, 2, 3, 4])
    return store


def test_a_prompt_in_full_has_no_parent(store: BaseStore) -> None:
    made = store.rebuild(PromptHeader("client", 2), [5, 6])
    assert (made.token_ids, made.parent, made.num_parent_tokens) == ([5, 6], None, 0)


@pytest.mark.parametrize(
    ("kept", "new", "expected"),
    [
        (4, [5], [1, 2, 3, 4, 5]),
        (4, [], [1, 2, 3, 4]),
        (2, [9, 9], [1, 2, 9, 9]),
        (0, [9], [9]),
    ],
)
def test_what_was_kept_of_the_base_comes_before_what_was_sent(
    store: BaseStore, kept: int, new: list[int], expected: list[int]
) -> None:
    made = store.rebuild(PromptHeader("client", 2, 1, kept), new)
    assert made.token_ids == expected
    assert made.array.tolist() == expected
    assert made.parent is not None
    assert (made.parent.token_ids, made.num_parent_tokens) == ((1, 2, 3, 4), kept)


def test_the_base_stays_what_it_was(store: BaseStore) -> None:
    made = store.rebuild(PromptHeader("client", 2, 1, 4), [5])
    made.token_ids.append(6)
    made.array[:] = 0
    assert store.rebuild(PromptHeader("client", 3, 1, 4), [7]).token_ids == [1, 2, 3, 4, 7]


@pytest.mark.parametrize(
    "header",
    [
        PromptHeader("client", 3, 2, 1),
        PromptHeader("another client", 2, 1, 4),
        PromptHeader("client", 2, 1, 5),
    ],
)
def test_without_the_base_or_all_of_it_there_is_a_miss(
    store: BaseStore, header: PromptHeader
) -> None:
    with pytest.raises(BaseMissError):
        store.rebuild(header, [5])


def test_a_prompt_without_version_is_not_remembered(store: BaseStore) -> None:
    assert receive(store, PromptHeader("client", NO_VERSION, 1, 4), []) == [1, 2, 3, 4]
    assert len(store) == 1


def test_the_checksum_of_the_whole_is_compared(store: BaseStore) -> None:
    whole = checksum(np.array([1, 2, 3, 4, 5], np.int32))
    header = PromptHeader("client", 2, 1, 4, checksum=whole)
    assert store.rebuild(header, [5]).token_ids == [1, 2, 3, 4, 5]
    for wrong in (header._replace(num_parent_tokens=3), header._replace(parent=0)):
        with pytest.raises(ChecksumError):
            store.rebuild(wrong, [5])


def test_equal_ids_are_one_object_also_across_bases(store: BaseStore) -> None:
    big = BaseStore(10_000, vocab_size=5000)
    left = big.rebuild(PromptHeader("client", 1), [int("4000"), -1, 7000])
    right = big.rebuild(PromptHeader("client", 2), [int("4000"), -1, 7000])
    assert left.token_ids == right.token_ids == [4000, -1, 7000], "also outside the vocabulary"
    assert left.token_ids[0] is right.token_ids[0]


def test_the_cost_counts_tokens_and_hashes(store: BaseStore) -> None:
    store.keep(PromptHeader("client", 2), base([1, 2], num_hashes=3))
    assert store.num_bytes == BYTES_PER_TOKEN * (4 + 2) + BYTES_PER_HASH * 3


def test_the_least_recently_used_base_goes_first() -> None:
    store = BaseStore(2 * 4 * BYTES_PER_TOKEN, vocab_size=10)
    receive(store, PromptHeader("client", 1), [1, 1, 1, 1])
    receive(store, PromptHeader("client", 2), [2, 2, 2, 2])
    receive(store, PromptHeader("client", NO_VERSION, 1, 4), [])  # uses the first
    receive(store, PromptHeader("client", 3), [3, 3, 3, 3])
    assert receive(store, PromptHeader("client", NO_VERSION, 1, 4), []) == [1, 1, 1, 1]
    with pytest.raises(BaseMissError):
        store.rebuild(PromptHeader("client", NO_VERSION, 2, 4), [])


def test_a_base_that_is_too_large_is_not_kept() -> None:
    store = BaseStore(3 * BYTES_PER_TOKEN, vocab_size=10)
    receive(store, PromptHeader("client", 1), [1, 1, 1, 1])
    assert (len(store), store.num_bytes) == (0, 0)


def test_a_version_that_comes_again_replaces_itself(store: BaseStore) -> None:
    """After ``SentVersions.forget`` a prompt that the engine does hold is sent in full again."""
    before = store.num_bytes
    for _ in range(3):
        receive(store, FIRST, [1, 2, 3, 4])
    assert (len(store), store.num_bytes) == (1, before)


def test_the_base_of_the_turn_before_last_goes(store: BaseStore) -> None:
    receive(store, PromptHeader("client", 2, 1, 4, parent_ends=True), [5])
    assert len(store) == 2, "a second answer to the first prompt may still be asked for"
    receive(store, PromptHeader("client", 3, 2, 5, parent_ends=True), [6])
    assert len(store) == 2
    with pytest.raises(BaseMissError):
        store.rebuild(PromptHeader("client", 4, 1, 4), [])
    assert store.num_bytes == BYTES_PER_TOKEN * (5 + 6)


def test_a_base_that_others_may_continue_stays(store: BaseStore) -> None:
    for version in (2, 3):
        receive(store, PromptHeader("client", version, version - 1, 2), [5, 5])
    assert len(store) == 3


def test_clear_gives_up_everything(store: BaseStore) -> None:
    assert store.clear() == 1
    assert (len(store), store.num_bytes) == (0, 0)
    with pytest.raises(BaseMissError):
        store.rebuild(PromptHeader("client", 2, 1, 4), [])

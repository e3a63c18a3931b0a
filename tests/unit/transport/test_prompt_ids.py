# SPDX-License-Identifier: Apache-2.0
"""A digest of a prompt: the same for the same ids, and of a turn only what is new is read."""

import random

import pytest

from vllm_stateful.transport import prompt_ids
from vllm_stateful.transport.prompt_ids import DIGEST_TOKENS, PromptTokenIds, digest_of


def ids_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50_000) for _ in range(length)]


def continued(parent: PromptTokenIds, shared: int, new: list[int]) -> PromptTokenIds:
    """As ``render`` makes a prompt of an earlier one."""
    digests = parent.digests[: shared // DIGEST_TOKENS]
    return PromptTokenIds([*parent[:shared], *new], num_parent_tokens=shared, digests=digests)


LENGTHS = [0, 1, DIGEST_TOKENS - 1, DIGEST_TOKENS, DIGEST_TOKENS + 1, 2 * DIGEST_TOKENS, 9_000]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_list_and_a_remembered_prompt_have_one_digest(length: int) -> None:
    ids = ids_of(length)
    made = PromptTokenIds(ids)
    assert digest_of(made) == digest_of(ids) == digest_of(made)
    assert len(made.digests) == length // DIGEST_TOKENS


@pytest.mark.parametrize("place", [0, 1, DIGEST_TOKENS - 1, DIGEST_TOKENS, 8_999])
def test_one_other_token_anywhere_is_another_digest(place: int) -> None:
    ids = ids_of(9_000)
    other = [*ids]
    other[place] += 1
    assert digest_of(ids) != digest_of(other)
    assert digest_of(ids) != digest_of(ids[:place]) != digest_of([*ids, 0])


def test_lengths_alone_make_a_difference() -> None:
    found = {digest_of([0] * length) for length in LENGTHS}
    assert len(found) == len(LENGTHS)


@pytest.mark.parametrize("seed", range(40))
def test_turns_and_edits_of_a_conversation_have_the_digests_of_their_ids(seed: int) -> None:
    rng = random.Random(seed)
    known = [PromptTokenIds(ids_of(rng.randrange(3 * DIGEST_TOKENS), seed))]
    for _ in range(6):
        parent = rng.choice(known)
        if rng.random() < 0.7:
            assert digest_of(parent) == digest_of([*parent])
        shared = rng.choice([len(parent), rng.randint(0, len(parent))])
        new = [rng.randrange(9) for _ in range(rng.choice([0, 3, DIGEST_TOKENS]))]
        known.append(continued(parent, shared, new))
        assert digest_of(known[-1]) == digest_of([*known[-1]])


def test_a_turn_reads_only_the_chunks_that_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = PromptTokenIds(ids_of(10 * DIGEST_TOKENS + 7))
    digest_of(parent)
    turn = continued(parent, len(parent), [1] * 700)
    read: list[int] = []
    real = prompt_ids._digest
    monkeypatch.setattr(prompt_ids, "_digest", lambda ids: read.append(len(ids)) or real(ids))
    assert digest_of(turn) != digest_of(parent)
    assert read == [707, 7]

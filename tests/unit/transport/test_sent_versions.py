# SPDX-License-Identifier: Apache-2.0
"""What is sent of a prompt, by what the engine was sent before."""

import pytest

from vllm_stateful.transport import sent_versions
from vllm_stateful.transport.header import NO_VERSION, PromptHeader
from vllm_stateful.transport.prompt_ids import PromptTokenIds
from vllm_stateful.transport.sent_versions import MIN_SAVED_TOKENS, SentVersions

LONG = MIN_SAVED_TOKENS


def prompt(version: int, length: int, parent: int = 0, shared: int = 0) -> PromptTokenIds:
    return PromptTokenIds(
        range(length), version=version, parent=parent, num_parent_tokens=shared, parent_ends=True
    )


@pytest.fixture
def sent() -> SentVersions:
    """The first version was sent to engine 0."""
    versions = SentVersions("client")
    versions.pack(0, prompt(1, LONG))
    return versions


def test_a_first_prompt_goes_in_full_under_its_version() -> None:
    ids = prompt(1, 5)
    parcel = SentVersions("client").pack(0, ids)
    assert parcel.header == PromptHeader("client", 1)
    assert parcel.token_ids == ids
    assert not parcel.is_delta


def test_a_continuation_goes_as_what_is_new(sent: SentVersions) -> None:
    parcel = sent.pack(0, prompt(2, LONG + 3, parent=1, shared=LONG))
    assert parcel.header == PromptHeader("client", 2, 1, LONG, True)
    assert parcel.token_ids == [LONG, LONG + 1, LONG + 2]
    assert parcel.is_delta


def test_what_goes_out_is_a_plain_list(sent: SentVersions) -> None:
    assert type(sent.pack(0, prompt(2, LONG + 3, parent=1, shared=LONG)).token_ids) is list


def test_a_repeated_prompt_is_its_own_base_and_nothing_is_new(sent: SentVersions) -> None:
    parcel = sent.pack(0, prompt(1, LONG))
    assert parcel.header == PromptHeader("client", NO_VERSION, 1, LONG)
    assert parcel.token_ids == []
    assert parcel.is_delta


def test_a_base_that_spares_little_is_not_worth_it(sent: SentVersions) -> None:
    assert not sent.pack(0, prompt(2, LONG + 3, parent=1, shared=LONG - 1)).is_delta


def test_another_engine_was_sent_nothing(sent: SentVersions) -> None:
    ids = prompt(2, LONG + 3, parent=1, shared=LONG)
    assert not sent.pack(1, ids).is_delta
    assert sent.pack(0, ids).is_delta


def test_an_unknown_parent_makes_it_go_in_full(sent: SentVersions) -> None:
    assert not sent.pack(0, prompt(3, LONG + 3, parent=2, shared=LONG)).is_delta


def test_a_delta_is_a_base_as_soon_as_it_is_on_its_way(sent: SentVersions) -> None:
    sent.pack(0, prompt(2, LONG + 1, parent=1, shared=LONG))
    assert sent.pack(0, prompt(3, LONG + 2, parent=2, shared=LONG + 1)).token_ids == [LONG + 1]


def test_after_a_miss_it_goes_in_full_and_is_a_base_again(sent: SentVersions) -> None:
    ids = prompt(2, LONG + 1, parent=1, shared=LONG)
    sent.pack(0, ids)
    sent.forget(0, ids)
    assert sent.pack(0, ids) == (PromptHeader("client", 2), ids)
    assert sent.pack(0, prompt(3, LONG + 2, parent=2, shared=LONG + 1)).is_delta
    assert not sent.pack(0, prompt(4, LONG + 2, parent=1, shared=LONG)).is_delta


def test_after_the_miss_of_a_repeated_prompt_it_goes_in_full(sent: SentVersions) -> None:
    ids = prompt(1, LONG)
    sent.forget(0, ids)
    assert not sent.pack(0, ids).is_delta


def test_a_miss_of_one_engine_says_nothing_about_another(sent: SentVersions) -> None:
    sent.pack(1, prompt(1, LONG))
    sent.forget(1, prompt(1, LONG))
    assert sent.pack(0, prompt(1, LONG)).is_delta
    sent.forget("never heard of", prompt(1, LONG))


def test_old_versions_are_forgotten_the_used_ones_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sent_versions, "MAX_VERSIONS", 2)
    sent = SentVersions("client")
    for version in (1, 2, 1, 3):
        sent.pack(0, prompt(version, LONG))
    assert [sent.pack(0, prompt(v, LONG)).is_delta for v in (1, 3)] == [True, True]
    assert not sent.pack(0, prompt(2, LONG)).is_delta

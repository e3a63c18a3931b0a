# SPDX-License-Identifier: Apache-2.0
"""What is remembered of earlier requests: for whom, for how long, how much."""

from __future__ import annotations

from typing import Any

from vllm_stateful.session.fingerprint import Change, Fingerprint, Reason, of_responses
from vllm_stateful.session.fingerprints import Fingerprints, key_of

API = "/v1/responses"


def of(text: str, previous: bytes = b"", **more: Any) -> Fingerprint:
    return of_responses({"model": "m", "input": text, **more}, previous)


def key(response_id: str, tenant: str = "t", salt: str = "") -> bytes:
    return key_of(API, tenant, salt, response_id)


def test_a_request_is_known_to_its_tenant_and_salt_only() -> None:
    kept = Fingerprints()
    kept.keep(key("r"), of("hi"), 7, now_s=0.0)
    found = kept.find(key("r"), now_s=1.0)
    assert found is not None
    assert found.num_tokens == 7
    for other in (
        key("r", "u"),
        key("r", "t", "s"),
        key("s"),
        key_of("/v1/messages", "t", "", "r"),
    ):
        assert kept.find(other, now_s=1.0) is None
    assert key_of("a", "bc", "", "d") != key_of("a", "b", "c", "d")


def test_it_is_forgotten_by_age_by_number_and_by_size() -> None:
    kept = Fingerprints(max_age_s=10.0)
    kept.keep(key("r"), of("hi"), 7, now_s=0.0)
    assert kept.find(key("r"), now_s=10.0) is not None
    assert kept.find(key("r"), now_s=10.1) is None
    assert (len(kept), kept.num_bytes) == (0, 0)

    kept = Fingerprints(max_requests=2)
    for name in "abc":
        kept.keep(key(name), of(name), 7, now_s=0.0)
        kept.find(key("a"), now_s=0.0)
    assert [kept.find(key(name), 0.0) is None for name in "abc"] == [False, True, False]

    kept = Fingerprints(max_bytes=2 * of("a").num_bytes)
    for name in "abc":
        kept.keep(key(name), of(name), 7, now_s=0.0)
    assert len(kept) == 2
    kept.keep(key("c"), of("c"), 8, now_s=0.0)
    assert len(kept) == 2
    assert kept.num_bytes == 2 * of("a").num_bytes


def test_tokens_that_nobody_counted_are_estimated() -> None:
    kept = Fingerprints()
    kept.keep(key("r"), of("x" * 400), 0, now_s=0.0)
    found = kept.find(key("r"), now_s=0.0)
    assert found is not None
    assert 100 <= found.num_tokens <= 130


def difference(kept: Fingerprints, before: str, now: Fingerprint) -> Change | None:
    found = kept.find(key(before), 0.0)
    assert found is not None
    return kept.compare_with(key(before), found, now, 0.0)


def test_a_conversation_goes_on_behind_the_responses_that_it_names() -> None:
    kept = Fingerprints()
    kept.keep(key("a"), of("one"), 7, 0.0)
    kept.keep(key("b"), of("two", key("a")), 9, 0.0)
    now = of("three", key("b"))
    assert difference(kept, "b", now) is None
    assert difference(kept, "a", now) is None
    assert difference(kept, "a", of("two", key("a"), instructions="x")) == Change(Reason.INPUT)
    assert difference(kept, "a", of("two", key("a"), model="n")) == Change(Reason.MODEL)


def test_where_the_chain_is_not_known_nothing_is_said() -> None:
    kept = Fingerprints()
    kept.keep(key("a"), of("one"), 7, 0.0)
    kept.keep(key("b"), of("two", key("a")), 9, 0.0)
    assert difference(kept, "a", of("two", key("other"))) == Change(Reason.UNKNOWN)
    assert difference(kept, "b", of("one")) == Change(Reason.UNKNOWN)
    sibling = difference(kept, "b", of("2", key("a")))
    assert sibling is not None
    assert sibling.reason is Reason.INPUT

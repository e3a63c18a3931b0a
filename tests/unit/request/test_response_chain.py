# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.request.response_chain import ResponseChain
from vllm_stateful.request.session_identity import TurnIdentity


def anonymous(tenant: str = "tenant-a") -> TurnIdentity:
    return TurnIdentity(session_id=None, source="none", tenant=tenant)


def test_a_chain_of_turns_is_one_session() -> None:
    chain = ResponseChain()
    first = chain.resolve(anonymous(), None, "resp_1")
    second = chain.resolve(anonymous(), "resp_1", "resp_2")
    third = chain.resolve(anonymous(), "resp_2", "resp_3")
    assert first.session_id == "previous-response-id:resp_1"
    assert first.source == "previous-response-id"
    assert second.session_id == third.session_id == first.session_id


def test_two_branches_from_one_response_are_one_session() -> None:
    chain = ResponseChain()
    left = chain.resolve(anonymous(), "resp_lost", "resp_2")
    right = chain.resolve(anonymous(), "resp_lost", "resp_3")
    assert left.session_id == right.session_id == "previous-response-id:resp_lost"


def test_a_session_named_by_the_client_is_kept_and_found_again() -> None:
    chain = ResponseChain()
    named = TurnIdentity(session_id="codex:12345678", source="codex", tenant="tenant-a")
    assert chain.resolve(named, "resp_0", "resp_1") == named
    later = chain.resolve(anonymous(), "resp_1", "resp_2")
    assert later.session_id == "codex:12345678"
    assert later.source == "previous-response-id"


def test_tenants_do_not_see_each_other() -> None:
    chain = ResponseChain()
    chain.record("tenant-a", "resp_1", "session-of-a")
    assert chain.lookup("tenant-a", "resp_1") == "session-of-a"
    assert chain.lookup("tenant-b", "resp_1") is None
    other = chain.resolve(anonymous("tenant-b"), "resp_1", "resp_2")
    assert other.session_id == "previous-response-id:resp_1"


def test_a_response_that_is_not_stored_starts_no_chain() -> None:
    chain = ResponseChain()
    assert chain.resolve(anonymous(), None, "resp_1", stored=False) == anonymous()
    assert len(chain) == 0
    chain.record("tenant-a", "resp_0", "session-0")
    assert chain.resolve(anonymous(), "resp_0", "resp_1", stored=False).session_id == "session-0"
    assert chain.lookup("tenant-a", "resp_1") is None


def test_the_least_recently_used_response_is_forgotten() -> None:
    chain = ResponseChain(max_responses=2)
    chain.record("t", "resp_1", "s1")
    chain.record("t", "resp_2", "s2")
    assert chain.lookup("t", "resp_1") == "s1"
    chain.record("t", "resp_3", "s3")
    assert chain.lookup("t", "resp_2") is None
    assert chain.lookup("t", "resp_1") == "s1"
    assert len(chain) == 2


def test_the_bound_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="max_responses"):
        ResponseChain(max_responses=0)


RESPONSE_IDS = st.one_of(
    st.none(),
    st.sampled_from(["resp_1", "resp_2", "resp_3"]),
    st.text(),
    st.text(st.characters(categories=["Cs"])),
    st.just("x" * 10_000),
    st.binary(),
    st.integers(),
    st.lists(st.integers()),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(RESPONSE_IDS, RESPONSE_IDS, st.booleans()), max_size=12))
def test_no_id_raises_and_the_bound_holds(turns: list[tuple[object, object, bool]]) -> None:
    chain = ResponseChain(max_responses=3)
    for previous, current, stored in turns:
        identity = chain.resolve(anonymous(), previous, current, stored=stored)
        assert (identity.session_id is None) == (identity.source == "none")
        assert len(chain) <= 3

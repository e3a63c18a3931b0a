# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.request.session_identity import (
    TurnIdentity,
    resolve_turn,
    scoped_salt,
    tenant_of,
)
from vllm_stateful.types import SALT_PREFIX, tenant_of_salt

ID = "0d3a9c52-6f1e-4b7a-8a55-2f6d0c9e7b11"


def turn_with_key(key: str, *, tenant_isolation: bool = True) -> TurnIdentity:
    headers = {"authorization": f"Bearer {key}"}
    body = {"session_id": ID}
    return resolve_turn(headers, body.get, tenant_isolation=tenant_isolation)


def test_tenant_comes_from_the_key_and_does_not_show_it() -> None:
    key = "sk-live-123456789"
    tenant = tenant_of({"authorization": f"Bearer {key}"})
    assert len(tenant) == 16
    assert int(tenant, 16) >= 0
    assert tenant not in key
    assert tenant == tenant_of({"authorization": f"bearer  {key} "})
    assert tenant == tenant_of({"x-api-key": key})
    assert tenant == tenant_of({"api-key": key})
    assert tenant == tenant_of({"authorization": f"Bearer {key}", "x-api-key": "another"})
    assert tenant != tenant_of({"x-api-key": "another"})


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer   ", "Basic dXNlcjpwdw=="])
def test_no_key_no_tenant(authorization: str) -> None:
    assert tenant_of({"authorization": authorization}) == ""


def test_one_session_id_under_two_keys_gets_two_salts() -> None:
    one = turn_with_key("key-one")
    two = turn_with_key("key-two")
    assert one.session_id == two.session_id
    assert scoped_salt(one.tenant, None) != scoped_salt(two.tenant, None)
    assert scoped_salt(one.tenant, "salt") != scoped_salt(two.tenant, "salt")


def test_without_isolation_there_is_one_tenant() -> None:
    assert turn_with_key("key-one", tenant_isolation=False).tenant == ""


def test_without_a_tenant_hashes_stay_those_of_stock() -> None:
    assert scoped_salt("", None) is None
    assert scoped_salt("", "my salt") == "my salt"


def test_nobody_can_choose_the_salt_of_a_tenant() -> None:
    salt = scoped_salt("0123456789abcdef", None)
    assert salt is not None
    assert scoped_salt("", salt) != salt


def test_the_tenant_can_be_read_back_from_a_salt_of_its_own() -> None:
    tenant = turn_with_key("key-one").tenant
    assert tenant_of_salt(scoped_salt(tenant, None)) == tenant
    assert tenant_of_salt(scoped_salt(tenant, "conversation 1")) == tenant
    assert tenant_of_salt(scoped_salt(tenant, scoped_salt(tenant, None))) == tenant


def test_no_salt_that_a_client_chooses_is_counted_as_somebody_else_s() -> None:
    victim = turn_with_key("key-one").tenant
    salt = scoped_salt(victim, "salt")
    for thief in ("", turn_with_key("key-two").tenant):
        for chosen in (salt, scoped_salt(victim, None), f"{SALT_PREFIX}{victim}.", victim):
            forged = scoped_salt(thief, chosen)
            assert forged not in (salt, scoped_salt(victim, None))
            assert tenant_of_salt(forged) == thief


@pytest.mark.parametrize("salt", [None, "", "my salt", SALT_PREFIX, "0123456789abcdef"])
def test_what_was_sent_without_a_tenant_belongs_to_none(salt: str | None) -> None:
    assert tenant_of_salt(scoped_salt("", salt)) == ""


SALT_TEXT = st.text(max_size=128)
TENANTS = st.one_of(st.just(""), st.text("0123456789abcdef", min_size=16, max_size=16), SALT_TEXT)
SALTS = st.one_of(st.none(), SALT_TEXT, st.just(SALT_PREFIX), SALT_TEXT.map(SALT_PREFIX.__add__))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TENANTS, SALTS), unique=True, max_size=12))
def test_scoped_salt_is_injective(pairs: list[tuple[str, str | None]]) -> None:
    salts = {scoped_salt(tenant, cache_salt) for tenant, cache_salt in pairs}
    assert len(salts) == len(pairs)
    chosen_by_clients = {("", salt) for salt in salts} | set(pairs)
    assert len({scoped_salt(*pair) for pair in chosen_by_clients}) == len(chosen_by_clients)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TENANTS, SALTS), max_size=12))
def test_salts_name_the_same_tenant_where_they_have_the_same(
    pairs: list[tuple[str, str | None]],
) -> None:
    named = [(tenant, tenant_of_salt(scoped_salt(tenant, salt))) for tenant, salt in pairs]
    assert len(set(named)) == len({tenant for tenant, _ in named})
    assert len({name for _, name in named}) == len(set(named))
    assert all(name == tenant for tenant, name in named if not tenant)


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1), SALTS)
def test_scoped_salt_respects_the_limits_of_vllm(tenant: str, cache_salt: str | None) -> None:
    salt = scoped_salt(tenant, cache_salt)
    assert salt is not None
    assert 0 < len(salt) <= 128
    assert not set(salt) & set("@/\\\x00")

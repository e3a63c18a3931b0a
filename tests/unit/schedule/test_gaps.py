# SPDX-License-Identifier: Apache-2.0
"""Histograms of gaps, and what they say a waiting session is worth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_stateful.schedule.gaps import (
    EDGES_S,
    LONGEST_S,
    MAX_TOOLS,
    MIN_GAPS,
    MIN_TENANTS,
    MOST_GAPS,
    NUM_BINS,
    Forecast,
    GapModel,
    OwnGaps,
    Wait,
    WaitKind,
    bin_of,
)

TOOL, USER = Wait(WaitKind.TOOL, "grep"), Wait(WaitKind.USER)


def rates(forecast: Forecast, *ages_s: float) -> list[float]:
    return [forecast.rate(age_s) for age_s in ages_s]


def only(place: int, share: float = 1.0) -> Forecast:
    """All that return do so in one bin."""
    shares = np.zeros(NUM_BINS + 1)
    shares[place], shares[-1] = share, 1 - share
    return Forecast(shares)


@given(st.floats(0, 1e7))
def test_each_time_has_its_bin(seconds: float) -> None:
    place = bin_of(seconds)
    assert 0 <= place < NUM_BINS
    if seconds < LONGEST_S:
        assert EDGES_S[place] <= seconds < EDGES_S[place + 1]


def test_a_fast_tool_is_worth_more_than_a_user_and_less_once_it_is_late() -> None:
    model = GapModel()
    tool, user = model.forecast("a", TOOL), model.forecast("a", USER)
    assert tool.rate(1) > user.rate(1)
    assert tool.rate(1) > tool.rate(60) > tool.rate(3600) > tool.rate(86000) > 0
    assert tool.rate(LONGEST_S) == 0


def test_the_worth_is_hits_per_second_kept() -> None:
    """All return in one bin: the blocks are kept until its middle, on average."""
    place = bin_of(100)
    until_s = (EDGES_S[place] + EDGES_S[place + 1]) / 2
    assert only(place).rate(0) == pytest.approx(1 / until_s)
    assert only(place, 0.5).rate(0) < only(place).rate(0)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=NUM_BINS + 1, max_size=NUM_BINS + 1).filter(any))
def test_the_worth_is_the_best_of_all_horizons(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    forecast = Forecast(shares)
    for start in range(0, NUM_BINS, 5):
        best, hits, kept, waiting = 0.0, 0.0, 0.0, 1 - shares[:start].sum()
        for place in range(start, NUM_BINS):
            span = EDGES_S[place + 1] - EDGES_S[place]
            kept += span * (waiting - shares[place] / 2)
            waiting -= shares[place]
            hits += shares[place]
            if kept > 1e-9:
                best = max(best, hits / kept)
        assert forecast.rate(EDGES_S[start]) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_a_slow_tool_is_learned_by_its_name() -> None:
    model = GapModel()
    slow = Wait(WaitKind.TOOL, "pytest")
    before = model.forecast("a", slow).rate(1)
    for _ in range(50):
        model.learn("a", slow, 300.0)
        model.learn("a", TOOL, 0.6)
    assert model.forecast("a", slow).rate(1) < before
    assert model.forecast("a", TOOL).rate(0) > 20 * model.forecast("a", slow).rate(0)
    assert model.forecast("a", slow).rate(250) > model.forecast("a", TOOL).rate(250)


def test_a_new_tool_starts_as_its_kind() -> None:
    model = GapModel()
    for _ in range(200):
        model.learn("a", TOOL, 30.0)
    new = model.forecast("a", Wait(WaitKind.TOOL, "never seen"))
    assert new.rate(20) > GapModel().forecast("a", TOOL).rate(20)


def test_tenants_learn_apart() -> None:
    model = GapModel()
    for _ in range(50):
        model.learn("a", TOOL, 300.0)
    assert rates(model.forecast("b", TOOL), 0, 9) == rates(GapModel().forecast("b", TOOL), 0, 9)


def test_those_who_never_come_back_are_worth_less_until_they_do() -> None:
    model, plain = GapModel(), GapModel()
    for _ in range(30):
        model.learn_lost("a", USER)
        plain.learn("a", USER, 100.0)
    lost = model.forecast("a", USER).rate(0)
    assert lost < plain.forecast("a", USER).rate(0)
    for _ in range(30):
        model.learn("a", USER, 100.0, was_lost=True)
    assert model.forecast("a", USER).rate(0) > lost


def test_what_was_learned_follows_a_change() -> None:
    model = GapModel()
    for gap_s in (1.0, 1000.0):
        for _ in range(3 * int(MOST_GAPS)):
            model.learn("a", TOOL, gap_s)
    assert model.forecast("a", TOOL).rate(500) > model.forecast("a", TOOL).rate(2000)


def test_a_session_is_expected_as_it_came_before() -> None:
    model, own = GapModel(), OwnGaps()
    for _ in range(20):
        own.add(WaitKind.TOOL, 600.0)
    typical, slow = model.forecast("a", TOOL), model.forecast("a", TOOL, own)
    assert slow.rate(0) < typical.rate(0)
    assert slow.rate(500) > typical.rate(500)
    other = model.forecast("a", USER, own)
    assert rates(other, 0, 99) == rates(model.forecast("a", USER), 0, 99)


def test_a_time_that_a_client_expects_counts_for_one_wait_only() -> None:
    """Neither other sessions nor later waits of this one are expected otherwise."""
    model, own = GapModel(), OwnGaps()
    plain, slow = model.forecast("a", TOOL), model.forecast("a", TOOL, own, 600.0)
    assert slow.rate(400.0) > plain.rate(400.0)
    assert slow.rate(0.0) < plain.rate(0.0)
    assert slow.returns == pytest.approx(plain.returns)
    assert rates(model.forecast("a", TOOL, own), 0.0, 60.0) == rates(plain, 0.0, 60.0)
    assert len(model) == 0


def test_memory_is_bounded() -> None:
    model = GapModel(max_histograms=8)
    for number in range(100):
        model.learn("a", Wait(WaitKind.TOOL, f"tool-{number}"), 1.0)
    assert len(model) <= 8


def tool(name: str) -> Wait:
    return Wait(WaitKind.TOOL, name)


def learned(model: GapModel, tenant: str, wait: Wait, gap_s: float, num: int = 50) -> None:
    for _ in range(num):
        model.learn(tenant, wait, gap_s)


def same(one: Forecast, other: Forecast) -> bool:
    return rates(one, *EDGES_S) == rates(other, *EDGES_S)


def test_one_tenant_s_tool_names_leave_what_another_has_learned() -> None:
    model = GapModel()
    learned(model, "b", tool("pytest"), 300.0)
    learned(model, "b", USER, 900.0)
    before = [model.forecast("b", wait) for wait in (tool("pytest"), USER, tool("new"))]
    for number in range(1100):
        model.learn("a", tool(f"tool-{number}"), 1.0)
    after = [model.forecast("b", wait) for wait in (tool("pytest"), USER, tool("new"))]
    assert all(same(*pair) for pair in zip(before, after, strict=True))
    assert len(model) <= MAX_TOOLS + 5


def test_a_tenant_s_tool_names_leave_what_it_learned_of_users() -> None:
    model = GapModel()
    learned(model, "a", Wait(WaitKind.USER, num_turns=1), 900.0)
    before = model.forecast("a", Wait(WaitKind.USER, num_turns=2))
    for number in range(1100):
        model.learn("a", tool(f"tool-{number}"), 1.0)
    assert same(model.forecast("a", Wait(WaitKind.USER, num_turns=2)), before)


def test_to_look_is_not_to_learn() -> None:
    model = GapModel()
    for number in range(100):
        model.forecast(f"tenant-{number}", tool(f"tool-{number}"))
    assert len(model) == 0


def test_a_new_tenant_starts_with_what_several_others_learned() -> None:
    model = GapModel()
    for number in range(MIN_TENANTS):
        learned(model, f"tenant-{number}", tool("pytest"), 300.0)
        learned(model, f"tenant-{number}", tool("grep"), 0.6)
    fresh = GapModel().forecast("new", tool("pytest"))
    assert model.forecast("new", tool("pytest")).rate(250) > 2 * fresh.rate(250)
    assert model.forecast("new", tool("grep")).rate(0) > 2 * fresh.rate(0)
    before = model.forecast("new", tool("pytest")).rate(0)
    learned(model, "new", tool("pytest"), 1.0, num=100)
    assert model.forecast("new", tool("pytest")).rate(0) > 10 * before


def test_what_few_tenants_learned_is_told_to_nobody() -> None:
    model = GapModel()
    for number in range(MIN_TENANTS - 1):
        learned(model, f"tenant-{number}", tool("secret"), 300.0)
    learned(model, "another", tool("secret"), 300.0, num=MIN_GAPS - 1)
    assert same(model.forecast("new", tool("secret")), GapModel().forecast("new", tool("secret")))


def test_one_tenant_counts_once_however_much_it_learned() -> None:
    loud, quiet = GapModel(), GapModel()
    for model, num in ((loud, 1500), (quiet, 200)):
        learned(model, "tenant-0", tool("pytest"), 300.0, num=num)
        for number in range(1, 10):
            learned(model, f"tenant-{number}", tool("pytest"), 1.0, num=20)
    loudly, quietly = (model.forecast("new", tool("pytest")).rate(0) for model in (loud, quiet))
    assert loudly == pytest.approx(quietly, rel=0.1)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("pqrstuvw"), st.booleans()),
        max_size=120,
    )
)
def test_the_books_agree_with_what_is_counted(events: list[tuple[str, str, bool]]) -> None:
    """A naive model: for each tenant the last names it used, and tenants by last use."""
    model = GapModel(max_histograms=12, max_tools=3)
    naive: dict[str, list[str]] = {}
    for tenant, name, is_lost in events:
        if is_lost:
            model.learn_lost(tenant, tool(name))
        else:
            model.learn(tenant, tool(name), 1.0)
        names = naive.pop(tenant, [])
        naive[tenant] = [*(each for each in names if each != name), name][-3:]
        while sum(1 + len(each) for each in naive.values()) > 12:
            del naive[next(iter(naive))]
        books = {tenant: [key[1] for key in book.tools] for tenant, book in model._books.items()}
        assert list(books.items()) == list(naive.items())
        assert len(model) == sum(len(book) for book in model._books.values())
        for key, tenants in model._learned.items():
            assert tenants
            for each, histogram in tenants.items():
                book = model._books[each]
                assert (book.tools.get(key) or book.kinds.get(key)) is histogram

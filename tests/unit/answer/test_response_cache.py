# SPDX-License-Identifier: Apache-2.0
"""Answers within their bytes, and requests that follow others, against naive models."""

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_stateful.answer.response_cache import KEY_BYTES, Answer, Flights, ResponseCache

KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])


@given(st.lists(st.tuples(KEYS, st.booleans(), st.integers(0, 600)), max_size=40))
def test_it_keeps_what_was_used_last_within_its_bytes(
    steps: list[tuple[bytes, bool, int]],
) -> None:
    limit = 1000
    cache: ResponseCache[int] = ResponseCache(limit)
    model: list[tuple[bytes, Answer[int]]] = []
    for key, is_read, size in steps:
        known = dict(model)
        if is_read:
            assert cache.get(key) == known.get(key)
            if key in known:
                model = [each for each in model if each[0] != key] + [(key, known[key])]
            continue
        answer = Answer(key, (size,), size)
        model = [each for each in model if each[0] != key]
        assert cache.put(answer) == (size + KEY_BYTES <= limit)
        if size + KEY_BYTES <= limit:
            model.append((key, answer))
        while sum(a.num_bytes + KEY_BYTES for _, a in model) > limit:
            model.pop(0)
        assert cache.num_bytes == sum(a.num_bytes + KEY_BYTES for _, a in model)
        assert len(cache) == len(model)
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


class AnyFlights(RuleBasedStateMachine):
    """Requests come, follow, leave and are answered; the engine must know what it works for."""

    def __init__(self) -> None:
        super().__init__()
        self.flights: Flights[int] = Flights()
        self.number = 0
        self.key: dict[str, bytes] = {}
        """Of every request that somebody waits for."""
        self.engine: dict[str, list[int]] = {}
        """What the engine works on, and the steps that it gave."""
        self.got: dict[str, list[int]] = {}

    @rule(key=KEYS, follows=st.booleans())
    def ask(self, key: bytes, follows: bool) -> None:
        self.number += 1
        name = str(self.number)
        self.key[name] = key
        flight = self.flights.join(key, name) if follows else None
        if flight is None:
            self.flights.begin(key, name)
            self.engine[name], self.got[name] = [], []
        else:
            self.got[name] = []
            assert flight.key == key

    @rule(data=st.data(), is_last=st.booleans())
    def step(self, data: st.DataObject, is_last: bool) -> None:
        if not self.engine:
            return
        name = data.draw(st.sampled_from(sorted(self.engine)))
        self.number += 1
        self.engine[name].append(self.number)
        flight = self.flights.came(name, self.number, 10)
        assert flight is not None
        for follower, number, value in flight.give():
            assert number == len(self.got[follower])
            self.got[follower].append(value)
        assert not list(flight.give())
        assert all(self.got[each] == self.engine[name] for each in flight.followers)
        if is_last:
            answer = self.flights.ends(flight)
            assert answer == Answer(
                flight.key, tuple(self.engine.pop(name)), 10 * len(answer.steps)
            )
            for each in (*flight.followers, *([name] if flight.is_led else ())):
                del self.key[each]

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if not self.key:
            return
        name = data.draw(st.sampled_from(sorted(self.key)))
        flight = self.flights.of(name)
        assert flight is not None
        assert (flight.leader == name) == (name in self.engine)
        del self.key[name]
        aborted = self.flights.leaves(name)
        if aborted is not None:
            del self.engine[aborted]
        assert self.flights.leaves("nobody") is None

    @rule()
    def forget(self) -> None:
        self.flights.forget()
        assert all(self.flights.join(key, "late") is None for key in (b"a", b"b", b"c", b"d"))

    @invariant()
    def the_engine_works_for_somebody(self) -> None:
        flights = {self.flights.led_by(name) for name in self.engine}
        assert None not in flights
        waiting = [each for f in flights if f for each in f.followers]
        waiting += [f.leader for f in flights if f and f.is_led]
        assert sorted(waiting) == sorted(self.key)
        assert len(self.flights) == len(self.engine)


TestAnyFlights = AnyFlights.TestCase

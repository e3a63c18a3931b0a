# SPDX-License-Identifier: Apache-2.0
"""Where resume points are wanted in a prompt."""

import numpy as np
import pytest

from vllm_stateful.prefix.boundaries import Cuts, Kind
from vllm_stateful.prefix.resume_places import MIN_SAVED, resume_places

SYSTEM, TOOLS, USER, ANSWER = Kind.SYSTEM, Kind.TOOLS, Kind.USER, Kind.ASSISTANT
CALL, RESULT, THOUGHT = Kind.TOOL_CALL, Kind.TOOL_RESULT, Kind.REASONING


def cuts(*segments: tuple[int, Kind]) -> Cuts:
    starts, kinds = zip(*segments, strict=True) if segments else ((), ())
    return Cuts(np.array(starts, np.int32), np.array([int(kind) for kind in kinds], np.uint8))


CASES = {
    "nothing is known": (cuts(), 0, 500, 0, [(500, False)]),
    "the first turn": (
        cuts((0, SYSTEM), (300, USER), (400, ANSWER)),
        *(0, 403, 0),
        [(300, True), (403, False)],
    ),
    "tools behind the system prompt": (
        cuts((0, SYSTEM), (100, TOOLS), (350, USER), (400, ANSWER)),
        *(0, 403, 0),
        [(350, True), (403, False)],
    ),
    "a short system prompt": (cuts((0, SYSTEM), (20, USER), (40, ANSWER)), 0, 43, 0, [(43, False)]),
    "no system prompt": (cuts((0, USER), (400, ANSWER)), 0, 403, 0, [(403, False)]),
    "the template opens reasoning": (
        cuts((0, SYSTEM), (300, USER), (400, ANSWER), (403, THOUGHT)),
        *(0, 405, 0),
        [(300, True), (403, False)],
    ),
    "it closes it at once": (
        cuts((0, SYSTEM), (300, USER), (400, ANSWER), (403, THOUGHT), (406, ANSWER)),
        *(0, 408, 0),
        [(300, True), (408, False)],
    ),
    "a later turn": (cuts((700, RESULT), (760, ANSWER)), 690, 763, 690, [(763, False)]),
    "a user speaks in a later turn": (
        cuts((700, ANSWER), (900, USER), (960, ANSWER)),
        *(690, 963, 690),
        [(963, False)],
    ),
    "it parts from one that cannot be continued there": (
        cuts((700, RESULT), (960, ANSWER)),
        *(300, 963, 650),
        [(650, True), (963, False)],
    ),
    "it parts a little behind a resume point": (
        cuts((700, RESULT), (960, ANSWER)),
        *(600, 963, 600 + MIN_SAVED - 1),
        [(963, False)],
    ),
}


def test_the_end_of_instructions_is_found_from_within_them() -> None:
    segments = cuts((700, USER), (760, ANSWER))
    within = resume_places(segments, 500, 763, 600, is_fork=False, before=SYSTEM)
    assert [(place.position, place.is_shared) for place in within] == [(700, True), (763, False)]
    assert [place.position for place in resume_places(segments, 500, 763, before=ANSWER)] == [763]


def test_a_question_is_told_from_a_result() -> None:
    (asked,) = resume_places(cuts((700, USER), (760, ANSWER)), 690, 763)
    (called,) = resume_places(cuts((700, RESULT), (760, ANSWER)), 690, 763)
    assert (asked.is_question, called.is_question) == (True, False)


def test_a_history_of_its_own_that_changed_is_shared_with_nobody() -> None:
    place, _ = resume_places(cuts((960, ANSWER)), 300, 963, 650, is_fork=False)
    assert (place.position, place.is_shared) == (650, False)


@pytest.mark.parametrize("name", CASES)
def test_places(name: str) -> None:
    segments, start, num_prompt, parted_at, expected = CASES[name]
    places = resume_places(segments, start, num_prompt, parted_at)
    assert [(place.position, place.is_shared) for place in places] == expected

# SPDX-License-Identifier: Apache-2.0
"""Every cause and every reason has a sentence."""

import itertools

import pytest

from vllm_stateful.session import Cause, Missed, Said, TurnRecord
from vllm_stateful.session.sentences import explained
from vllm_stateful.types import Bypass, Demotion, Identity, SessionKey

SESSION = SessionKey(Identity(), "session-one")


def record(missed: Missed, said: Said | None = None) -> TurnRecord:
    made = TurnRecord("request-1", SESSION, 0.0, "resumed", 1500, 1000, missed=missed)
    made.queue_s, made.first_token_s, made.waited_s, made.waited_for = 0.002, 1.5, 150.0, "bash"
    made.said = said or Said()
    return made


def test_a_changed_history() -> None:
    missed = Missed(Cause.CHANGED, 400, token=1000, message=3, kind="tool_result")
    missed.num_behind_snapshot = 1
    missed.before, missed.now = "Monday", "Tuesday"
    assert explained(record(missed).as_dict()) == [
        "Resumed: of 1,500 tokens, 1,000 reused, 500 computed.",
        "The history changed at token 1,000, in messages[3]: a tool's result.",
        "400 tokens had been computed before.",
        "The same before that, but without a resume point: 1 token.",
        "Before: 'Monday'",
        "Now:    'Tuesday'",
        "Times: waited 2 min for bash before it, 2 ms in the queue, 1.5 s to the first token.",
    ]


REASONS = [
    *((Cause.EVICTED, str(why)) for why in Demotion if why is not Demotion.SUPERSEDED),
    (Cause.EVICTED, "not_kept"),
    *((Cause.BYPASSED, str(why)) for why in Bypass),
    *((cause, None) for cause in Cause if cause not in (Cause.EVICTED, Cause.BYPASSED)),
]


@pytest.mark.parametrize(("cause", "why"), REASONS)
def test_every_reason_has_a_sentence_of_its_own(cause: Cause, why: str | None) -> None:
    missed = Missed(cause, 0, token=7, kind="user", why_gone=why, gone_s=3.0, idle_s=0.5)
    reason = explained(record(missed).as_dict())[1]
    assert reason.endswith(".")
    assert "None" not in reason
    assert why is None or why not in ("not_kept", "skip_reading_prefix_cache") or why not in reason


def test_reasons_differ() -> None:
    made = [
        explained(record(Missed(cause, 0, token=7, why_gone=why)).as_dict())[1]
        for cause, why in REASONS
    ]
    assert all(one != other for one, other in itertools.combinations(made, 2))


def test_what_the_client_said() -> None:
    said = Said("codex", None, compaction=True, rejected="body: too short", retry=2)
    sentences = explained(record(Missed(), said).as_dict())
    assert "Its client said that it summarizes its history." in sentences
    assert "Its client had sent it 2 times before." in sentences
    assert "A session id that it sent was not used: body: too short." in sentences


def test_a_retry_a_window_and_merged_system_messages() -> None:
    made = record(Missed(), Said("codex", retry=1, window=4, merged=1))
    made.window_before = 3
    sentences = explained(made.as_dict())
    assert "Its client had sent it once before." in sentences
    assert any("context window 4, after 3" in each for each in sentences)
    assert any("1 system message in mid-conversation. vLLM merged it" in each for each in sentences)
    made.window_before, made.said = 4, Said("codex", window=4, merged=2)
    sentences = explained(made.as_dict())
    assert not any("window" in each for each in sentences)
    assert any("2 system messages" in each for each in sentences)

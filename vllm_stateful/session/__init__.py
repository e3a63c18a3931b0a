# SPDX-License-Identifier: Apache-2.0
"""What is remembered of sessions and turns, to explain why a turn did not reuse more.

Nothing is decided by it. ``prefix`` has what a session keeps, and ``request`` has how its client
named it.
"""

from vllm_stateful.session.fingerprint import Change, Fingerprint, Reason, compare
from vllm_stateful.session.fingerprints import Fingerprints, Remembered
from vllm_stateful.session.session_book import SessionBook, Story
from vllm_stateful.session.turn_log import TurnLog, client_id
from vllm_stateful.session.turn_record import Cause, Missed, Said, TurnRecord, name_of
from vllm_stateful.session.why import Found, why_not_more

__all__ = [
    "Cause",
    "Change",
    "Fingerprint",
    "Fingerprints",
    "Found",
    "Missed",
    "Reason",
    "Remembered",
    "Said",
    "SessionBook",
    "Story",
    "TurnLog",
    "TurnRecord",
    "client_id",
    "compare",
    "name_of",
    "why_not_more",
]

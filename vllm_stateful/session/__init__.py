# SPDX-License-Identifier: Apache-2.0
"""Stage of the session's story: what its turns reused, and why not more. Decides nothing."""

from vllm_stateful.session.session_book import SessionBook, Story
from vllm_stateful.session.turn_log import TurnLog
from vllm_stateful.session.turn_record import Cause, Missed, Said, TurnRecord, name_of
from vllm_stateful.session.why import Found, why_not_more

__all__ = [
    "Cause",
    "Found",
    "Missed",
    "Said",
    "SessionBook",
    "Story",
    "TurnLog",
    "TurnRecord",
    "name_of",
    "why_not_more",
]

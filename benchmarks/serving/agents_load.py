# SPDX-License-Identifier: Apache-2.0
"""The workloads of the paper, from recorded conversations: which turn of which agent comes when."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.recorded import Conversation, Count, Step, conversations, rendered

SERVICE, BUGFIX, CODING = "service", "bugfix", "coding"
INTERLEAVED, BURST = "interleaved", "burst"
SHORT_TURNS, CODING_TURNS = 6, 35
NUM_INTERLEAVED, INTERLEAVED_TURNS = 3, 5
NUM_BURST, BURST_TURNS = 8, 2
MAX_ANSWER_TOKENS = 200
SPARE_TOKENS = 64
TEMPLATE_TOKENS = 8


@dataclass(frozen=True)
class Turn:
    """One turn of one conversation, by their places."""

    conversation: int
    turn: int


Wave = tuple[Turn, ...]
"""Turns that are sent at the same moment."""


@dataclass(frozen=True)
class Workload:
    """Conversations, and the order of their turns.

    Attributes:
        about: what it stands for.
    """

    name: str
    about: str
    conversations: tuple[Conversation, ...]
    waves: tuple[Wave, ...]


@dataclass(frozen=True)
class LongSession:
    """Turns in a row of one source.

    Attributes:
        num_recorded: recorded conversations that were joined to it.
        num_tokens: of its messages and answers, without the system message.
    """

    source: str
    conversation: Conversation
    num_recorded: int
    num_tokens: int


Make = Callable[[Path, Count, int, int], Workload]
"""Gets the traces, how to count, the longest prompt with its answer, and how many conversations
where that is free."""


def service(traces: Path, count: Count, max_tokens: int, number: int) -> Workload:
    """(a) Six turns with a customer, tau-bench's airline; each task once."""
    chosen = _service(traces, count, max_tokens, SHORT_TURNS)[:number]
    about = f"{SHORT_TURNS}-turn customer service"
    return Workload(SERVICE, about, chosen, one_by_one(chosen))


def bugfix(traces: Path, count: Count, max_tokens: int, number: int) -> Workload:
    """(a) Six steps of a bug fix, SWE-agent."""
    found = conversations(traces, ["sweagent"], count, max_answer_tokens=MAX_ANSWER_TOKENS)
    chosen = _short(found, count, max_tokens, SHORT_TURNS)[:number]
    return Workload(BUGFIX, f"{SHORT_TURNS}-step bug fix", chosen, one_by_one(chosen))


def coding(traces: Path, count: Count, max_tokens: int, number: int) -> Workload:
    """(b) 35 turns in a row out of a coding session of 439, where they fit the model."""
    found = long_sessions(traces, "pi-mono", count, max_tokens)
    made = tuple(session.conversation for session in found[:number])
    return Workload(CODING, f"{CODING_TURNS}-turn coding", made, one_by_one(made))


def long_sessions(
    traces: Path, source: str, count: Count, max_tokens: int, num_turns: int = CODING_TURNS
) -> list[LongSession]:
    """Turns in a row out of one source that fit the model and share none, the shortest first.

    Recorded conversations with the same system message are joined in the order of the file: their
    user goes on with the next task.
    """
    groups: dict[str, list[Conversation]] = {}
    for each in conversations(traces, [source], count, max_answer_tokens=max_tokens):
        groups.setdefault(each.system["content"], []).append(each)
    found = [
        session
        for group in groups.values()
        for session in _windows(source, group, count, max_tokens, num_turns)
    ]
    return sorted(found, key=lambda session: session.num_tokens)


def _windows(
    source: str, group: Sequence[Conversation], count: Count, max_tokens: int, num_turns: int
) -> Iterator[LongSession]:
    system = group[0].system
    steps = [(each.name, step) for each in group for step in each.steps]
    sizes = [_size(step, count) for _, step in steps]
    room = max_tokens - SPARE_TOKENS - TEMPLATE_TOKENS - count(system["content"])
    starts = range(len(sizes) - num_turns)
    totals = {start: sum(sizes[start : start + num_turns]) for start in starts}
    chosen: list[int] = []
    for start in sorted(starts, key=lambda start: totals[start]):
        is_apart = all(abs(start - other) >= num_turns for other in chosen)
        if is_apart and totals[start] <= room:
            chosen.append(start)
            names, turns = zip(*steps[start : start + num_turns], strict=True)
            conversation = Conversation(f"{group[0].name}-{start}", system, turns)
            yield LongSession(source, conversation, len(set(names)), totals[start])


def interleaved(traces: Path, count: Count, max_tokens: int, number: int) -> Workload:
    """(c) Three agents with the same tools, five turns each, turn about."""
    found = _service(traces, count, max_tokens, INTERLEAVED_TURNS)
    chosen = found[-NUM_INTERLEAVED * number :]
    waves = [
        (Turn(first + agent, turn),)
        for first in range(0, len(chosen), NUM_INTERLEAVED)
        for turn in range(INTERLEAVED_TURNS)
        for agent in range(NUM_INTERLEAVED)
    ]
    about = f"{NUM_INTERLEAVED} agents x {INTERLEAVED_TURNS} turns, interleaved"
    return Workload(INTERLEAVED, about, chosen, tuple(waves))


def burst(traces: Path, count: Count, max_tokens: int, number: int) -> Workload:
    """(d) Eight agents with the same tools, all at the same moment, two turns each."""
    chosen = _service(traces, count, max_tokens, BURST_TURNS)[: NUM_BURST * number]
    waves = [
        tuple(Turn(first + agent, turn) for agent in range(NUM_BURST))
        for first in range(0, len(chosen) - NUM_BURST + 1, NUM_BURST)
        for turn in range(BURST_TURNS)
    ]
    return Workload(BURST, f"{NUM_BURST}-way burst x {BURST_TURNS}", chosen, tuple(waves))


WORKLOADS: dict[str, Make] = {
    SERVICE: service,
    BUGFIX: bugfix,
    CODING: coding,
    INTERLEAVED: interleaved,
    BURST: burst,
}


def _service(
    traces: Path, count: Count, max_tokens: int, num_turns: int
) -> tuple[Conversation, ...]:
    """The first of the two trials of each task: the second says nearly the same."""
    found = conversations(traces, ["taubench"], count, max_answer_tokens=MAX_ANSWER_TOKENS)
    once = [conversation for conversation in found if conversation.name.endswith("-r0")]
    return _short(once, count, max_tokens, num_turns)


def _short(
    found: Sequence[Conversation], count: Count, max_tokens: int, num_turns: int
) -> tuple[Conversation, ...]:
    """The first turns of those that have as many and fit."""
    made = []
    for conversation in found:
        steps = conversation.steps[:num_turns]
        messages = [conversation.system]
        for step in steps:
            messages += [*step.new_messages, {"role": "assistant", "content": step.answer}]
        if len(steps) == num_turns and count(rendered(messages)) + SPARE_TOKENS <= max_tokens:
            made.append(Conversation(conversation.name, conversation.system, steps))
    return tuple(made)


def _size(step: Step, count: Count) -> int:
    """With what the template puts around each message."""
    texts = [message["content"] for message in step.new_messages] + [step.answer]
    return sum(count(text) + TEMPLATE_TOKENS for text in texts)


def one_by_one(chosen: Sequence[Conversation]) -> tuple[Wave, ...]:
    """Each conversation after the one before it, turn by turn."""
    return tuple(
        (Turn(place, turn),)
        for place, conversation in enumerate(chosen)
        for turn in range(len(conversation.steps))
    )

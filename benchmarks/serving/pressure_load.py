# SPDX-License-Identifier: Apache-2.0
"""The load of the pressure benchmark: who sends what, and when. Nothing here is measured.

Sessions replay recorded conversations. They start as a Poisson process, and the run opens on one
that has been going on for half an hour: some sessions are in progress, and nothing of them is
cached yet. In a session the next turn comes a recorded gap after the answer, as an agent's client
does it. One-shot requests, a Poisson process of their own, pass through the cache and never come
back. Which turns fall into a run is decided here, with a nominal service time, and not by how fast
a server is: so both sides get the same ones. The same seed makes the same load.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.serving.recorded import (
    TOOL,
    USER,
    Conversation,
    Count,
    Message,
    Step,
    cut_at_sentence,
    rendered,
    shared_text,
)

TOOL_TURN, USER_TURN, FIRST = "tool turn", "user turn", "first turn"
RUNNING, ONE_SHOT = "in progress", "one-shot"
KINDS = (TOOL_TURN, USER_TURN, FIRST, RUNNING, ONE_SHOT)
"""What a turn waited for; RUNNING is the first in the run of a session that began before it."""

BEFORE_S = 1800.0
"""So much earlier sessions may have begun; no recorded conversation takes as long."""

SPARE_TOKENS = 16
NOMINAL_PREFILL_S, NOMINAL_DECODE_S = 0.0025, 0.022
"""Of the small model on an idle core, at 5,600 tokens; not much beside the gaps."""


@dataclass(frozen=True)
class LoadOptions:
    """What a run is made from; rates are per minute."""

    max_sessions: int
    session_rate: float
    one_shot_rate: float
    minutes: float
    tool_cap_s: float
    user_cap_s: float
    max_request_tokens: int
    has_own_line: bool = True
    """Whether each system message begins with the name of its session, so that none is shared."""
    one_shot_tokens: tuple[int, int] = (500, 1500)

    @property
    def run_s(self) -> float:
        return self.minutes * 60


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    Attributes:
        gap_s: From the end of the answer before to sending this one; from the beginning of the run
            for the first.
        new_messages: What it adds to the answer before; all since the system message for the first.
        answer: What the model is made to say.
        num_new_tokens: Of the prompt, those that no turn of the session has brought before.
    """

    kind: str
    gap_s: float
    new_messages: tuple[Message, ...]
    answer: str
    num_prompt_tokens: int
    num_answer_tokens: int
    num_new_tokens: int

    @property
    def max_tokens(self) -> int:
        """A model that may cut its answer into other tokens needs more of them."""
        return 2 * self.num_answer_tokens + SPARE_TOKENS


@dataclass(frozen=True)
class Session:
    """A recorded conversation in the run.

    Attributes:
        held: From when on it is how many tokens long, its turns before and behind the run too.
        ends_s: The end of its last answer.
    """

    name: str
    conversation: str
    system: Message
    turns: tuple[Turn, ...]
    held: tuple[tuple[float, int], ...]
    ends_s: float


@dataclass(frozen=True)
class OneShot:
    """A request that nobody continues."""

    name: str
    start_s: float
    text: str


@dataclass(frozen=True)
class Load:
    """One run."""

    run_s: float
    sessions: tuple[Session, ...]
    one_shots: tuple[OneShot, ...]
    shared_tokens: dict[str, int]
    """Of each system message, with the tools in it."""

    @property
    def longest_request(self) -> int:
        """Tokens of the longest prompt of a session with all that its answer may have."""
        turns = [turn for session in self.sessions for turn in session.turns]
        return max((turn.num_prompt_tokens + turn.max_tokens for turn in turns), default=0)

    @property
    def least_prefill(self) -> int:
        """Prompt tokens that a cache that forgets nothing has to compute, without one-shots."""
        turns = [turn for session in self.sessions for turn in session.turns]
        return sum(self.shared_tokens.values()) + sum(turn.num_new_tokens for turn in turns)


def make_load(
    seed: int,
    options: LoadOptions,
    recorded: Sequence[Conversation],
    gaps: dict[str, list[float]],
    texts: Sequence[str],
    count: Count,
) -> Load:
    """Draw one run; in it each recorded conversation and each text is used at most once.

    Raises:
        ValueError: there are not enough recorded conversations or texts.
    """
    chance = Random(f"pressure {seed}")
    waiting = deque(chance.sample(recorded, len(recorded)))
    sessions: list[Session] = []
    for start_s in poisson(chance, options.session_rate, -BEFORE_S, options.run_s):
        if len(sessions) == options.max_sessions:
            break
        if not waiting:
            raise ValueError(f"more than the {len(recorded)} recorded conversations are needed")
        conversation = waiting.popleft()
        waits = _draw_gaps(chance, conversation.steps, gaps, options)
        name = f"pressure-{seed}-session-{len(sessions) + 1}"
        session = _session(name, start_s, conversation, waits, options, count)
        if session.turns:
            sessions.append(session)
        else:
            waiting.append(conversation)  # over before the run, or in a wait that lasts longer
    shared = {s.system["content"]: count(shared_text(s.system)) for s in sessions}
    shots = tuple(_one_shots(chance, options, texts, count))
    return Load(options.run_s, tuple(sessions), shots, shared)


def poisson(chance: Random, per_minute: float, from_s: float, until_s: float) -> Iterator[float]:
    """Arrival times."""
    now_s = from_s
    while per_minute > 0:
        now_s += chance.expovariate(per_minute / 60)
        if now_s >= until_s:
            return
        yield now_s


def _draw_gaps(
    chance: Random, steps: Sequence[Step], gaps: dict[str, list[float]], options: LoadOptions
) -> list[float]:
    """A recorded wait before each step but the first; longer ones are cut to fit into a run."""
    caps = {TOOL: options.tool_cap_s, USER: options.user_cap_s}
    waits = [0.0]
    for before in steps[:-1]:
        trigger = TOOL if before.calls_tool else USER
        waits.append(min(chance.choice(gaps[trigger]), caps[trigger]))
    return waits


def _session(
    name: str,
    start_s: float,
    conversation: Conversation,
    waits: Sequence[float],
    options: LoadOptions,
    count: Count,
) -> Session:
    """The turns that begin in the run, were every server idle."""
    system = conversation.system
    if options.has_own_line:
        system = system | {"content": f"Session {name}.\n\n{system['content']}"}
    messages, new = [system], list[Message]()
    turns: list[Turn] = []
    held: list[tuple[float, int]] = []
    ends_s, num_known, kind = start_s, count(shared_text(system)), FIRST
    num_cached = num_known
    for step, wait_s in zip(conversation.steps, waits, strict=True):
        messages += step.new_messages
        new += step.new_messages
        num_prompt, num_answer = count(rendered(messages)), count(step.answer)
        if num_prompt + num_answer > options.max_request_tokens:
            break
        begins_s = ends_s + wait_s
        ends_s = begins_s + num_answer * NOMINAL_DECODE_S
        ends_s += (num_prompt - num_known) * NOMINAL_PREFILL_S
        num_known = num_prompt + num_answer
        held.append((begins_s, num_known))
        answer = {"role": "assistant", "content": step.answer}
        messages.append(answer)
        if 0 <= begins_s < options.run_s:
            now = RUNNING if kind != FIRST and not turns else kind
            gap_s = wait_s if turns else begins_s
            sizes = (num_prompt, num_answer, num_prompt - num_cached)
            turns.append(Turn(now, gap_s, tuple(new), step.answer, *sizes))
            new, num_cached = [], num_known
        else:
            new.append(answer)
        kind = TOOL_TURN if step.calls_tool else USER_TURN
    return Session(name, conversation.name, system, tuple(turns), tuple(held), ends_s)


def _one_shots(
    chance: Random, options: LoadOptions, texts: Sequence[str], count: Count
) -> Iterator[OneShot]:
    """Arrivals with a beginning of a recorded text each."""
    waiting = chance.sample(texts, len(texts))
    least, most = options.one_shot_tokens
    for number, start_s in enumerate(poisson(chance, options.one_shot_rate, 0, options.run_s), 1):
        num_tokens, text = chance.randint(least, most), ""
        while count(text) < least:
            if not waiting:
                raise ValueError(f"recorded texts are enough for {number - 1} one-shots only")
            text = cut_at_sentence(waiting.pop(), count, num_tokens)
        yield OneShot(f"one-shot-{number}", start_s, text)

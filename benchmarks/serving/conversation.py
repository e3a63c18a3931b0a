# SPDX-License-Identifier: Apache-2.0
"""Conversations of a wanted length: the same for the same numbers, and unlike each other."""

import json
from collections.abc import Callable, Iterator
from random import Random

Message = dict[str, str]
Count = Callable[[str], int]
"""How many tokens a text has."""

MIN_MESSAGE_TOKENS = 12
TEMPLATE_TOKENS = 5  # what ChatML puts around a message

_WORD_TEXT = (
    "account agent answer archive balance batch block branch buffer cache call carrier change "
    "check claim client column commit context copy count customer daily delay delivery device "
    "digest driver early engine entry error event failure field file filter flight folder frame "
    "gateway graph group handle header history hotel image index input invoice item journey key "
    "label latency ledger length limit list load local machine market measure memory merge "
    "message metric minute model module monthly morning name network node notice number object "
    "offer office order output owner packet page parcel part passenger path payment peak phase "
    "plan policy pool price process profile prompt query queue quiet range rate reading record "
    "region relay report request reserve result return review river route row sample schedule "
    "score season server session shard share signal size source stage station status step stock "
    "storage stream summary supplier table target task team tenant ticket token total trace "
    "train transfer travel update user value vendor version vessel volume warning weather weight"
)
_WORDS = _WORD_TEXT.split()
_LINK_TEXT = "and after because before but for from in of on so that then until when where with"
_LINKS = _LINK_TEXT.split()


def history(seed: int, num_tokens: int, num_messages: int, count: Count) -> list[Message]:
    """Messages of about `num_tokens` tokens in ChatML, the last one from the user.

    One message is a single document. More alternate between user and assistant, below a system
    message where the number is even; every third text looks like the result of a tool.

    Raises:
        ValueError: there is not enough text for so many messages.
    """
    if not fits(num_tokens, num_messages):
        raise ValueError(f"{num_tokens} tokens are too few for {num_messages} messages")
    random = Random(f"history {seed} {num_tokens} {num_messages}")
    roles = ["user" if place % 2 == 0 else "assistant" for place in range(num_messages)]
    roles = roles if num_messages % 2 else ["system", *roles[:-1]]
    messages: list[Message] = []
    num_left = num_tokens - TEMPLATE_TOKENS * num_messages
    for place, role in enumerate(roles):
        share = num_left // (num_messages - place)
        is_tool_like = num_messages > 1 and place % 3 == 2
        content = text(random, share, count, pieces=_TOOL_LIKE if is_tool_like else _ALL)
        messages.append({"role": role, "content": content})
        num_left -= count(content)
    return messages


def fits(num_tokens: int, num_messages: int) -> bool:
    """Whether every message gets at least a sentence."""
    return num_tokens >= MIN_MESSAGE_TOKENS * num_messages


def turns(
    seed: int, first: list[Message], num_turns: int, num_delta_tokens: int, count: Count
) -> Iterator[list[Message]]:
    """The messages of each turn: the history as it is, then an answer and a question more each."""
    messages = list(first)
    yield list(messages)
    for turn in range(1, num_turns):
        random = Random(f"turn {seed} {turn}")
        answer, question = sentence(random), text(random, num_delta_tokens, count)
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
        yield list(messages)


def text(
    random: Random,
    num_tokens: int,
    count: Count,
    pieces: tuple[Callable[[Random], str], ...] = (),
) -> str:
    """Prose, code and records, at most `num_tokens` tokens long and a few words short of it."""
    made: list[str] = []
    num_left = num_tokens
    while num_left > 0:
        piece = random.choice(pieces or _ALL)(random)
        num_piece_tokens = count(piece + "\n")
        if num_piece_tokens > num_left:
            piece = _cut(piece, num_left, count)
            made += [piece] if piece or not made else []
            break
        made.append(piece)
        num_left -= num_piece_tokens
    return "\n".join(made)


def _cut(piece: str, num_tokens: int, count: Count) -> str:
    """The longest beginning, in whole words, that has at most so many tokens."""
    words = piece.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(words[:middle])) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def sentence(random: Random) -> str:
    """Ten to twenty words that look like English."""
    words = [random.choice(_WORDS) for _ in range(random.randint(8, 14))]
    for place in range(2, len(words) - 1, 3):
        words[place] += f" {random.choice(_LINKS)} the"
    return f"The {' '.join(words)} {random.randint(2, 999)}."


def _paragraph(random: Random) -> str:
    return " ".join(sentence(random) for _ in range(random.randint(2, 4)))


def _code(random: Random) -> str:
    name, first, second, third = (random.choice(_WORDS) for _ in range(4))
    return (
        f"def {name}_{first}({second}: int, {third}: str) -> bool:\n"
        f"    if {second} > {random.randint(10, 5000)} and {third} != {first!r}:\n"
        f"        return {name}_{random.choice(_WORDS)}({third}, limit={random.randint(1, 64)})\n"
        f"    return {second} % {random.randint(2, 97)} == 0\n"
    )


def _record(random: Random) -> str:
    fields = {random.choice(_WORDS): random.choice(_WORDS) for _ in range(4)}
    return json.dumps({"id": random.randint(1000, 99999), **fields, "ok": random.random() < 0.5})


def _log_line(random: Random) -> str:
    hour, minute = random.randint(0, 23), random.randint(0, 59)
    words = " ".join(random.choice(_WORDS) for _ in range(4))
    return f"{hour:02}:{minute:02} {random.choice(_WORDS)}.py:{random.randint(1, 900)} {words}"


_TOOL_LIKE = (_record, _log_line)
_ALL = (_paragraph, _code, _record, _log_line, _paragraph)

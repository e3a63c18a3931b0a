# SPDX-License-Identifier: Apache-2.0
"""The bursts: sub-agents that start on the same recorded history, each with an end of its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from random import Random

from benchmarks.serving.recorded import Conversation, Count, Message, cut_at_sentence, rendered

AT_ONCE, FORKED, STAGGERED = "at once", "forked", "staggered"
VARIANTS = (AT_ONCE, FORKED, STAGGERED)
"""All at the same moment from nothing; so, but behind a turn of their parent; one by one."""

Ids = Callable[[str], list[int]]


@dataclass(frozen=True)
class Burst:
    """Requests with the same beginning.

    Attributes:
        name: No two bursts share anything: it stands at the beginning of the system message.
        parent: The messages of the parent's turn.
        answer: What the parent is made to say.
        tasks: The last message of each sub-agent, behind the parent's answer.
        num_parent_tokens: Of the parent's prompt and answer.
        num_shared_tokens: Of the prompts, up to the first token that differs.
        num_private_tokens: Of all prompts behind it.
    """

    name: str
    parent: tuple[Message, ...]
    answer: str
    tasks: tuple[str, ...]
    num_parent_tokens: int
    num_shared_tokens: int
    num_private_tokens: int

    def least_prefill(self, variant: str) -> int:
        """One prefix, where it is not cached yet, and all private ends."""
        num_cached = self.num_parent_tokens if variant == FORKED else 0
        return self.num_shared_tokens - num_cached + self.num_private_tokens

    def messages(self, agent: int) -> list[Message]:
        """The conversation of one sub-agent."""
        answer = {"role": "assistant", "content": self.answer}
        return [*self.parent, answer, {"role": "user", "content": self.tasks[agent]}]


def make_burst(
    name: str,
    seed: int,
    recorded: Sequence[Conversation],
    texts: Sequence[str],
    *,
    num_prefix_tokens: int,
    num_private_tokens: int,
    num_agents: int,
    ids: Ids,
) -> Burst:
    """Draw one burst; the same name and seed make the same one.

    Raises:
        ValueError: there is not enough recorded text.
    """

    def count(text: str) -> int:
        return len(ids(text))

    chance = Random(f"burst {name} {seed}")
    chosen = chance.sample(recorded, len(recorded))
    system = {"role": "system", "content": f"Burst {name}.\n\n{chosen[0].system['content']}"}
    *parent, answer = _history(system, chosen, num_prefix_tokens, count)
    ends = list(islice(_ends(chance, texts, num_private_tokens, count), num_agents))
    if len(ends) < num_agents:
        raise ValueError(f"recorded texts are enough for {len(ends)} sub-agents only")
    tasks = tuple(f"Task {number}: {text}" for number, text in enumerate(ends, 1))
    num_parent = count(rendered(parent)) + count(answer["content"])
    burst = Burst(name, tuple(parent), answer["content"], tasks, num_parent, 0, 0)
    prompts = [ids(rendered(burst.messages(agent))) for agent in range(num_agents)]
    columns = zip(*prompts, strict=False)
    num_shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    num_private = sum(len(prompt) - num_shared for prompt in prompts)
    return replace(burst, num_shared_tokens=num_shared, num_private_tokens=num_private)


def _history(
    system: Message, conversations: Iterable[Conversation], num_tokens: int, count: Count
) -> list[Message]:
    """Turns of one conversation after the other, as many as fit; the last message is an answer."""
    messages = [system]
    for conversation in conversations:
        for step in conversation.steps:
            answer = {"role": "assistant", "content": step.answer}
            longer = [*messages, *step.new_messages, answer]
            if count(rendered(longer)) > num_tokens:
                if len(messages) == 1:
                    raise ValueError(f"no recorded turn fits into {num_tokens} tokens")
                return messages
            messages = longer
    raise ValueError(f"recorded conversations have less than {num_tokens} tokens")


def _ends(chance: Random, texts: Sequence[str], num_tokens: int, count: Count) -> Iterator[str]:
    """Beginnings of recorded texts, nearly as long as wanted."""
    for text in chance.sample(texts, len(texts)):
        end = cut_at_sentence(text, count, num_tokens)
        if count(end) > 0.7 * num_tokens:
            yield end

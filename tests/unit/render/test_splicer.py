# SPDX-License-Identifier: Apache-2.0
"""Generated ids in a history: what stays, what is tokenized anew, and that nothing shifts."""

from collections import Counter
from collections.abc import Sequence

import pytest
from tokenizer_kinds import qwen
from tokenizers import Tokenizer

from vllm_stateful.render.incremental_tokenizer import IncrementalTokenizer
from vllm_stateful.render.safe_cuts import CutRules
from vllm_stateful.render.splicer import Spliced, Splicer
from vllm_stateful.render.text_memory import TextMemory
from vllm_stateful.transport.prompt_ids import PromptTokenIds

PROMPT = "<|im_start|>user\nadd 1 and 2<|im_end|>\n<|im_start|>assistant\n"
REST = "<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>{"name":"add","arguments":{"a":1,"b":2}}</tool_call>'
RENDERED = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


class Client:
    """Tokenizes prompts, and says what the model answered."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = qwen()
        self.counts: Counter[Spliced] = Counter()
        rules = CutRules.of(self.tokenizer.get_added_tokens_decoder())
        splicer = Splicer(self.decode, lambda result: self.counts.update([result]))
        size = self.tokenizer.get_vocab_size()
        self.incremental = IncrementalTokenizer(rules, 0, size, TextMemory(1 << 20), splicer)
        self.incremental.min_bytes = 0

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def ask(self, text: str, tenant: str = "") -> PromptTokenIds:
        ids = self.incremental.tokenize(text, self.encode, tenant=tenant, add_special_tokens=False)
        assert ids is not None
        return ids

    def answer(self, prompt: PromptTokenIds, ids: Sequence[int]) -> None:
        self.incremental.memory.add_answer(prompt.version, tuple(ids))


@pytest.fixture
def client() -> Client:
    return Client()


def test_a_tool_call_that_means_the_same_keeps_its_ids(client: Client) -> None:
    prompt = client.ask(PROMPT)
    generated = client.encode(CALL + "<|im_end|>")
    client.answer(prompt, generated)
    turn = client.ask(PROMPT + RENDERED + REST)
    assert turn.is_spliced
    assert list(turn) == [*prompt, *generated, *client.encode(REST)[1:]]
    assert (turn.parent, turn.num_parent_tokens) == (prompt.version, len(prompt))
    assert client.counts == {Spliced.KEPT: 1}


@pytest.mark.parametrize(
    ("generated", "rendered"),
    [(CALL, RENDERED), ("three", "three"), ("a<|im_start|>b", "a<|im_start|>b")],
)
def test_an_answer_that_was_ended_keeps_its_ids(
    client: Client, generated: str, rendered: str
) -> None:
    """By its tool call or by max_tokens: the end-of-turn token is the template's."""
    prompt = client.ask(PROMPT)
    ids = client.encode(generated)
    client.answer(prompt, ids)
    turn = client.ask(PROMPT + rendered + REST)
    assert list(turn) == [*prompt, *ids, *client.encode(REST)]
    assert client.counts == {Spliced.KEPT: 1}


def test_a_text_that_ends_inside_an_ended_answer_keeps_nothing(client: Client) -> None:
    prompt = client.ask(PROMPT)
    client.answer(prompt, client.encode(CALL))
    turn = client.ask(PROMPT + RENDERED)
    assert list(turn) == client.encode(PROMPT + RENDERED)


def test_the_turns_after_it_build_on_the_kept_ids(client: Client) -> None:
    prompt = client.ask(PROMPT)
    client.answer(prompt, client.encode(CALL + "<|im_end|>"))
    turn = client.ask(PROMPT + RENDERED + REST)
    client.answer(turn, client.encode("three<|im_end|>"))
    later = client.ask(PROMPT + RENDERED + REST + "three<|im_end|>\n<|im_start|>user\nx<|im_end|>")
    assert later.is_spliced
    assert list(later[: len(turn)]) == list(turn)
    assert client.decode(later) == PROMPT + CALL + REST + (
        "three<|im_end|>\n<|im_start|>user\nx<|im_end|>"
    )
    edited = client.ask(PROMPT + RENDERED + REST.replace("3", "4"))
    assert client.decode(edited) == PROMPT + CALL + REST.replace("3", "4")


def test_a_text_is_kept_in_the_spelling_that_was_generated(client: Client) -> None:
    prompt = client.ask(PROMPT)
    letters = [token for char in "three" for token in client.encode(char)]
    assert letters != client.encode("three")
    client.answer(prompt, [*letters, *client.encode("<|im_end|>")])
    turn = client.ask(PROMPT + "three" + REST)
    assert list(turn) == [*prompt, *letters, *client.encode(REST)]


@pytest.mark.parametrize(
    ("generated", "rendered", "result"),
    [
        ("four<|im_end|>", "three", Spliced.DIFFERENT),
        ("<think>x</think>three<|im_end|>", "three", Spliced.DIFFERENT),
        (CALL + "<|im_end|>", RENDERED.replace("1", "7"), Spliced.DIFFERENT),
        ("thr", "three", Spliced.UNFINISHED),
        ("<think>x</think>three", "three", Spliced.UNFINISHED),
        (CALL, RENDERED.replace("1", "7"), Spliced.UNFINISHED),
        (CALL, RENDERED + RENDERED, Spliced.UNFINISHED),
    ],
)
def test_anything_else_is_tokenized_as_ever(
    client: Client, generated: str, rendered: str, result: Spliced
) -> None:
    prompt = client.ask(PROMPT)
    client.answer(prompt, client.encode(generated))
    turn = client.ask(PROMPT + rendered + REST)
    assert not turn.is_spliced
    assert list(turn) == client.encode(PROMPT + rendered + REST)
    assert client.counts == {result: 1}


def test_of_several_answers_the_one_that_came_back(client: Client) -> None:
    prompt = client.ask(PROMPT)
    for text in ("one", "two", "three"):
        client.answer(prompt, client.encode(f"{text}<|im_end|>"))
    turn = client.ask(PROMPT + "two" + REST)
    assert turn.is_spliced
    assert client.decode(turn) == PROMPT + "two" + REST


def test_other_tenants_never_see_the_kept_ids(client: Client) -> None:
    prompt = client.ask(PROMPT)
    client.answer(prompt, client.encode(CALL + "<|im_end|>"))
    other = client.ask(PROMPT + RENDERED + REST, tenant="other")
    assert list(other) == client.encode(PROMPT + RENDERED + REST)


def test_answers_count_towards_the_bound(client: Client) -> None:
    prompt = client.ask(PROMPT)
    memory = client.incremental.memory
    before = memory.num_bytes
    client.answer(prompt, range(100))
    assert memory.num_bytes == before + 4000
    client.answer(prompt, range(1 << 16))
    assert (memory.num_bytes, len(memory)) == (0, 0)

# SPDX-License-Identifier: Apache-2.0
"""Where messages begin in token ids: real template formats, and ids that mean nothing."""

import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from vllm_stateful.prefix import boundaries
from vllm_stateful.prefix.boundaries import MAX_HEADER, BoundaryRules, Cuts, Kind

SMOLLM2 = Path(__file__).parents[3] / ".cache/models/smollm2-135m/tokenizer.json"

# ---- chat templates, shortened by hand ---------------------------------------------------

QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = messages.index(m) %}{% endfor %}"
    "<|im_start|>system\n{{ messages[0].content }}\n\n# Tools\n<tools>\n{{ tools }}\n</tools>\n"
    '<tool_call>\n{"name": <function-name>}\n</tool_call><|im_end|>\n'
    "{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if messages.index(m) > ns.last %}<think>\n{{ m.reasoning }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.calls %}{{ '' if loop.first and not m.content else '\n' }}"
    '<tool_call>\n{"name": "weather", "arguments": {{ call }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% else %}{{ '<|im_start|>user' if loop.previtem.role != 'tool' }}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{{ '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}{% endif %}{% endfor %}"
    "<|im_start|>assistant\n"
)
HERMES = (
    "<|im_start|>system\n{{ messages[0].content }}<tools>{{ tools }}</tools>\n"
    "Call within <tool_call></tool_call>.<|im_end|>\n"
    "{% for m in messages[1:] %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.calls or [] %}\n<tool_call>\n{{ call }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAMA31 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.calls %}<|python_tag|>weather.call({{ m.calls[0] }})<|eom_id|>"
    "{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
MISTRAL = (
    "<s>[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]"
    "{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "{{ '[AVAILABLE_TOOLS]' + tools + '[/AVAILABLE_TOOLS]' if loop.first }}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS]id[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]{% else %}"
    "[THINK]{{ m.reasoning }}[/THINK]{{ m.content }}"
    "{% for call in m.calls %}[TOOL_CALLS]weather[ARGS]{{ call }}{% endfor %}"
    "</s>{% endif %}{% endfor %}"
)
GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT.<|end|>"
    "<|start|>developer<|message|>{{ messages[0].content }}\n# Tools\n{{ tools }}<|end|>"
    "{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% elif m.role == 'tool' %}"
    "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"
    "{{ m.content }}<|end|>{% else %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning }}<|end|>"
    "{% for call in m.calls %}"
    "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{{ call }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% endfor %}{% endif %}{% endfor %}<|start|>assistant"
)

ADDED = re.compile(r"<[|｜][^<>]+[|｜]>|\[/?[a-zA-Z_]+\]|<(?:/?s|sop)>")
INSIDE = re.compile(ADDED.pattern + r"|</?(?:think|tool_call|tool_response|arg_key)>")
"""What is one token in a text; with those that are text for SmolLM2 and the first Hermes."""

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rome and Oslo?"},
    {"role": "assistant", "content": "", "reasoning": "Ask.", "calls": ['"Rome"', '"Oslo"']},
    {"role": "tool", "content": "22C"},
    {"role": "tool", "content": "2C"},
    {"role": "assistant", "content": "Warm; cold.", "reasoning": "Done.", "calls": []},
]
FOLLOW_UP = {"role": "user", "content": "And Bonn?"}
TOOLS = json.dumps([{"type": "function", "function": {"name": "weather"}}])


def render(template: str, messages: Sequence[Any]) -> str:
    made = jinja2.Template(template, keep_trailing_newline=True)
    return made.render(messages=messages, tools=TOOLS)


def tokenizer(text: str, added: re.Pattern[str] = INSIDE) -> Tokenizer:
    """A byte-level BPE with the added tokens that occur in a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    words = "system developer user assistant ipython tool analysis commentary functions weather\n\n"
    made.train_from_iterator([words, QWEN3, GPT_OSS, TOOLS], trainer)
    names = dict.fromkeys(added.findall(text))
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return made


def array(ids: Sequence[int]) -> Any:
    return np.array(ids, np.int32)


def segments(text: str, made: Tokenizer | None = None) -> list[tuple[str, str]]:
    """Kind and text of each segment; first the text before them, where there is any."""
    made = made or tokenizer(text)
    ids = made.encode(text, add_special_tokens=False).ids
    decode = partial(made.decode, skip_special_tokens=False)
    rules = BoundaryRules.of(made.get_vocab(), decode)
    assert rules is not None
    cuts = rules.cuts(array(ids))
    bounds = [0, *cuts.starts.tolist(), len(ids)]
    texts = [decode(ids[first:last]) for first, last in pairwise(bounds)]
    kinds = ["-", *(Kind(int(kind)).name for kind in cuts.kinds)]
    return [pair for pair in zip(kinds, texts, strict=True) if pair != ("-", "")]


def test_qwen3() -> None:
    found = segments(render(QWEN3, MESSAGES))
    assert found[0][0] == "SYSTEM"
    assert "<tool_call>" in found[0][1], "its example is no call"
    call = '<tool_call>\n{"name": "weather", "arguments": '
    assert found[1:] == [
        ("USER", "<|im_start|>user\nRome and Oslo?<|im_end|>\n"),
        ("ASSISTANT", "<|im_start|>assistant\n"),
        ("REASONING", "<think>\nAsk.\n</think>\n\n"),
        ("TOOL_CALL", call + '"Rome"}\n</tool_call>\n'),
        ("TOOL_CALL", call + '"Oslo"}\n</tool_call><|im_end|>\n'),
        ("TOOL_RESULT", "<|im_start|>user\n<tool_response>\n22C\n</tool_response>\n"),
        ("TOOL_RESULT", "<tool_response>\n2C\n</tool_response><|im_end|>\n"),
        ("ASSISTANT", "<|im_start|>assistant\n"),
        ("REASONING", "<think>\nDone.\n</think>\n\n"),
        ("ASSISTANT", "Warm; cold.<|im_end|>\n"),
        ("ASSISTANT", "<|im_start|>assistant\n"),
    ]
    kinds = [kind for kind, _ in segments(render(QWEN3, [*MESSAGES, FOLLOW_UP]))]
    assert "REASONING" not in kinds, "earlier reasoning is stripped"
    assert kinds[-3:] == ["ASSISTANT", "USER", "ASSISTANT"]
    assert kinds.count("TOOL_CALL") == kinds.count("TOOL_RESULT") == 2


HERMES_SEGMENTS = [
    ("USER", "<|im_start|>user\nRome and Oslo?<|im_end|>\n"),
    ("ASSISTANT", "<|im_start|>assistant\n\n"),
    ("TOOL_CALL", '<tool_call>\n"Rome"\n</tool_call>\n'),
    ("TOOL_CALL", '<tool_call>\n"Oslo"\n</tool_call><|im_end|>\n'),
    ("TOOL_RESULT", "<|im_start|>tool\n<tool_response>\n22C\n</tool_response><|im_end|>\n"),
    ("TOOL_RESULT", "<|im_start|>tool\n<tool_response>\n2C\n</tool_response><|im_end|>\n"),
    ("ASSISTANT", "<|im_start|>assistant\nWarm; cold.<|im_end|>\n"),
    ("ASSISTANT", "<|im_start|>assistant\n"),
]


def test_hermes() -> None:
    found = segments(render(HERMES, MESSAGES))
    assert found[0][0] == "SYSTEM"
    assert found[1:] == HERMES_SEGMENTS


def smollm2(_: str) -> Tokenizer:
    if not SMOLLM2.exists():
        pytest.skip(f"{SMOLLM2} is absent: `make model` fetches the model's real tokenizer")
    return Tokenizer.from_file(str(SMOLLM2))


@pytest.mark.parametrize("made", [lambda text: tokenizer(text, ADDED), smollm2])
def test_without_tokens_for_calls_they_are_text_of_the_assistant(made: Any) -> None:
    text = render(HERMES, MESSAGES)
    found = segments(text, made(text))
    kinds = [kind for kind, _ in HERMES_SEGMENTS if kind != "TOOL_CALL"]
    assert [kind for kind, _ in found] == ["SYSTEM", *kinds]
    assert found[2][1].endswith('<tool_call>\n"Oslo"\n</tool_call><|im_end|>\n')


def test_llama31() -> None:
    found = segments(render(LLAMA31, MESSAGES))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert found == [
        ("-", "<|begin_of_text|>"),
        ("SYSTEM", header("system") + "Be brief.<|eot_id|>"),
        ("USER", header("user") + "Rome and Oslo?<|eot_id|>"),
        ("ASSISTANT", header("assistant")),
        ("TOOL_CALL", '<|python_tag|>weather.call("Rome")<|eom_id|>'),
        ("TOOL_RESULT", header("ipython") + "22C<|eot_id|>"),
        ("TOOL_RESULT", header("ipython") + "2C<|eot_id|>"),
        ("ASSISTANT", header("assistant") + "Warm; cold.<|eot_id|>"),
        ("ASSISTANT", header("assistant")),
    ]


def test_mistral() -> None:
    assert segments(render(MISTRAL, [*MESSAGES, FOLLOW_UP])) == [
        ("-", "<s>"),
        ("SYSTEM", "[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]"),
        ("TOOLS", f"[AVAILABLE_TOOLS]{TOOLS}[/AVAILABLE_TOOLS]"),
        ("USER", "[INST]Rome and Oslo?[/INST]"),
        ("REASONING", "[THINK]Ask.[/THINK]"),
        ("TOOL_CALL", '[TOOL_CALLS]weather[ARGS]"Rome"'),
        ("TOOL_CALL", '[TOOL_CALLS]weather[ARGS]"Oslo"</s>'),
        ("TOOL_RESULT", "[TOOL_RESULTS]id[TOOL_CONTENT]22C[/TOOL_RESULTS]"),
        ("TOOL_RESULT", "[TOOL_RESULTS]id[TOOL_CONTENT]2C[/TOOL_RESULTS]"),
        ("REASONING", "[THINK]Done.[/THINK]"),
        ("ASSISTANT", "Warm; cold.</s>"),
        ("USER", "[INST]And Bonn?[/INST]"),
    ]


def test_gpt_oss() -> None:
    call = "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>"
    result = "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"
    found = segments(render(GPT_OSS, MESSAGES))
    assert [kind for kind, _ in found[:2]] == ["SYSTEM", "SYSTEM"]
    assert found[2:] == [
        ("USER", "<|start|>user<|message|>Rome and Oslo?<|end|>"),
        ("REASONING", "<|start|>assistant<|channel|>analysis<|message|>Ask.<|end|>"),
        ("TOOL_CALL", call + '"Rome"<|call|>'),
        ("TOOL_CALL", call + '"Oslo"<|call|>'),
        ("TOOL_RESULT", result + "22C<|end|>"),
        ("TOOL_RESULT", result + "2C<|end|>"),
        ("REASONING", "<|start|>assistant<|channel|>analysis<|message|>Done.<|end|>"),
        ("ASSISTANT", "<|start|>assistant<|channel|>final<|message|>Warm; cold.<|end|>"),
        ("ASSISTANT", "<|start|>assistant"),
    ]


GLM_SEGMENTS = [
    ("-", "[gMASK]<sop>"),
    ("SYSTEM", "<|system|>\n# Tools\n<tool_call>{function-name}\n</tool_call>"),
    ("SYSTEM", "<|system|>\nBe brief."),
    ("USER", "<|user|>\nRome and Oslo?"),
    ("ASSISTANT", "<|assistant|>\n"),
    ("REASONING", "<think>Ask.</think>\n"),
    ("TOOL_CALL", "<tool_call>weather\n<arg_key>city</arg_key></tool_call>\n"),
    ("TOOL_CALL", "<tool_call>weather\n</tool_call>"),
    ("TOOL_RESULT", "<|observation|>\n<tool_response>\n22C\n</tool_response>\n"),
    ("TOOL_RESULT", "<tool_response>\n2C\n</tool_response>"),
    ("ASSISTANT", "<|assistant|>\n"),
    ("REASONING", "<think></think>\n"),
    ("ASSISTANT", "Warm; cold."),
]
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather<｜tool▁call▁end｜>"
DEEPSEEK_SEGMENTS = [
    ("-", "<｜begin▁of▁sentence｜>"),
    ("SYSTEM", "Be brief. First print <｜tool▁calls▁begin｜>"),
    ("USER", "<｜User｜>Rome and Oslo?"),
    ("ASSISTANT", "<｜Assistant｜></think>"),
    ("TOOL_CALL", f"<｜tool▁calls▁begin｜>{DEEPSEEK_CALL}\n"),
    ("TOOL_CALL", f"{DEEPSEEK_CALL}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"),
    ("TOOL_RESULT", "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>22C<｜tool▁output▁end｜>\n"),
    ("TOOL_RESULT", "<｜tool▁output▁begin｜>2C<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"),
    ("ASSISTANT", "Warm; cold.<｜end▁of▁sentence｜>"),
    ("USER", "<｜User｜>And Bonn?"),
    ("ASSISTANT", "<｜Assistant｜>"),
    ("REASONING", "<think>\n"),
]
KIMI_CALL = "<|tool_call_begin|>weather:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
KIMI_SEGMENTS = [
    ("TOOLS", "<|im_system|>tool_declare<|im_middle|>[]<|im_end|>"),
    ("SYSTEM", "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"),
    ("USER", "<|im_user|>user<|im_middle|>Rome and Oslo?<|im_end|>"),
    ("ASSISTANT", "<|im_assistant|>assistant<|im_middle|>"),
    ("REASONING", "<think>Ask.</think>"),
    ("ASSISTANT", "Both."),
    ("TOOL_CALL", "<|tool_calls_section_begin|>" + KIMI_CALL),
    ("TOOL_CALL", KIMI_CALL + "<|tool_calls_section_end|><|im_end|>"),
    ("TOOL_RESULT", "<|im_system|>weather<|im_middle|>## Return of weather:0\n22C<|im_end|>"),
    ("ASSISTANT", "<|im_assistant|>assistant<|im_middle|>"),
]


@pytest.mark.parametrize("expected", [GLM_SEGMENTS, DEEPSEEK_SEGMENTS, KIMI_SEGMENTS])
def test_further_styles(expected: list[tuple[str, str]]) -> None:
    assert segments("".join(text for _, text in expected)) == expected


MARKERS = list(dict.fromkeys(text for _, style in boundaries._STYLES for text in style))
WORDS = [
    *(*MARKERS, *boundaries._INSIDE, *boundaries._HEADER_ENDS, *boundaries._HEADER_PARTS),
    *("system", "user", "assistant", "tool", "analysis", "functions.", " to=", "x", "\n", " "),
]
"""Of all styles at once: ids that follow no template."""
VOCABULARY = {word: token for token, word in enumerate(WORDS)}
STRANGE = (-(2**31), -1, len(WORDS), 2**31 - 1)
MESSAGE = st.tuples(
    st.sampled_from(["<|im_start|>", "<|start|>", "<|start_header_id|>", "<|im_system|>"]),
    st.sampled_from(["user", "assistant", "tool", "functions."]),
    st.sampled_from(["\n", "<|channel|>", "<|end_header_id|>", " to=", "</think>"]),
    st.sampled_from(["<tool_response>", "analysis", "\n", "[/INST]", "<think>"]),
).map(lambda words: [VOCABULARY[word] for word in words])
ANYTHING = st.sampled_from([*range(len(WORDS)), *STRANGE]).map(lambda token: [token])
IDS = st.lists(MESSAGE | ANYTHING, max_size=60).map(lambda parts: array([*chain(*parts)]))


def rules_of_words(decode: Any = None) -> BoundaryRules:
    rules = BoundaryRules.of(VOCABULARY, decode or (lambda ids: "".join(WORDS[i] for i in ids)))
    assert rules is not None
    return rules


RULES = rules_of_words()


def pairs(cuts: Cuts) -> list[tuple[int, int]]:
    return list(zip(cuts.starts.tolist(), cuts.kinds.tolist(), strict=True))


@given(ids=IDS)
def test_whatever_the_ids_the_starts_ascend(ids: Any) -> None:
    cuts = RULES.cuts(ids)
    assert (cuts.starts.dtype, cuts.kinds.dtype) == (np.int32, np.uint8)
    assert len(cuts.starts) == len(cuts.kinds)
    assert np.all(np.diff(cuts.starts) > 0)
    assert np.all((cuts.starts >= 0) & (cuts.starts < len(ids)))
    assert all(kind in list(Kind) for kind in cuts.kinds.tolist())


@settings(max_examples=200, deadline=None)
@given(ids=IDS, data=st.data())
def test_from_any_position_on_the_cuts_are_those_of_the_whole(ids: Any, data: Any) -> None:
    whole = RULES.cuts(ids)
    start = data.draw(st.integers(0, len(ids)))
    tail = RULES.cuts(ids, start, whole.kind_of(start - 1))
    assert pairs(tail) == [pair for pair in pairs(whole) if pair[0] >= start]


@settings(max_examples=200, deadline=None)
@given(ids=IDS, data=st.data())
def test_a_prompt_that_grows_in_any_steps_is_cut_as_in_one(ids: Any, data: Any) -> None:
    known, num_known = Cuts.none(), 0
    for end in [*sorted(data.draw(st.lists(st.integers(0, len(ids))))), len(ids)]:
        known, num_known = RULES.extended(ids[:end], known, num_known), end
    assert pairs(known) == pairs(RULES.cuts(ids))


@given(ids=IDS, other=IDS, data=st.data())
def test_after_an_edit_only_what_is_the_same_is_kept(ids: Any, other: Any, data: Any) -> None:
    num_same = data.draw(st.integers(0, len(ids)))
    edited = np.concatenate([ids[:num_same], other])
    assert pairs(RULES.extended(edited, RULES.cuts(ids), num_same)) == pairs(RULES.cuts(edited))


@given(ids=IDS)
def test_headers_that_were_forgotten_are_read_again(ids: Any) -> None:
    forgetful = rules_of_words()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundaries, "MAX_KNOWN_HEADERS", 2)
        assert pairs(forgetful.cuts(ids)) == pairs(RULES.cuts(ids))


@given(ids=IDS)
def test_a_decoder_that_fails_hides_roles_and_nothing_else(ids: Any) -> None:
    rules = rules_of_words(lambda ids: [][ids[0]])
    by_role = {VOCABULARY["<|im_start|>"], VOCABULARY["<|start|>"], VOCABULARY["<|im_system|>"]}
    opened = np.flatnonzero(np.isin(ids, list(by_role)))
    assert set(opened.tolist()) <= set(rules.cuts(ids).starts.tolist())


@pytest.mark.parametrize("spelled", ["assistant<|channel|>analysis", "assistant\0analysis"])
def test_a_text_that_spells_a_marker_is_none(spelled: str) -> None:
    ids = array([VOCABULARY[text] for text in ("<|start|>", "x", "<|message|>", "x")])
    assert pairs(rules_of_words(lambda _: spelled).cuts(ids)) == [(0, Kind.ASSISTANT)]


def test_a_header_without_an_end_is_read_so_far_and_no_further() -> None:
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.extend(ids)
        return "user" if len(decoded) == 1 else "x"

    ids = array([VOCABULARY["<|im_start|>"], *range(1000, 1000 + 3 * MAX_HEADER)])
    vocabulary = VOCABULARY | {f"w{token}": token for token in range(1000, 2000)}
    rules = BoundaryRules.of(vocabulary, decode)
    assert rules is not None
    for _ in range(3):
        assert pairs(rules.cuts(ids)) == [(0, Kind.OTHER)]
    assert len(decoded) == MAX_HEADER, "each once"


def test_a_vocabulary_that_shows_no_style_has_no_rules() -> None:
    for texts in ([], ["hello"], ["<think>", "<tool_call>"], ["[INST]"], ["<|start|>"]):
        vocabulary = {text: token for token, text in enumerate(texts)}
        assert BoundaryRules.of(vocabulary, lambda ids: "") is None

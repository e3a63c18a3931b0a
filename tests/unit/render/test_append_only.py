# SPDX-License-Identifier: Apache-2.0
"""Templates that write each message on its own, and those that look around; text by text."""

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vllm_stateful.render.append_only import is_append_only
from vllm_stateful.render.continued_text import continued_text, generation_prompt

ROOT = Path(__file__).parents[3]
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LOOKS_BACK = """{%- set lead = messages[0].content if messages[0].role == 'system' else '' -%}
{{- lead -}}{%- for message in messages -%}
{%- if not loop.first and messages[loop.index0 - 1].role == message.role -%}{{- ' & ' -}}
{%- else -%}{{- '\\n' + message.role + ': ' -}}{%- endif -%}
{%- for word in message.content.split() -%}{{- word -}}{%- if not loop.last -%}{{- ' ' -}}
{%- endif -%}{%- endfor -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n>' -}}{%- endif -%}"""
GOOD = {
    "chatml": CHATML,
    "looks back": LOOKS_BACK,
    "tools": (ROOT / "benchmarks/models/smollm2_tools.jinja").read_text(),
    "a default": "{% if add_generation_prompt is not defined %}"
    + "{% set add_generation_prompt = false %}{% endif %}"
    + CHATML,
}
LOOP = "{% for message in messages %}"
BAD = {
    "not a template": "{% for %}",
    "no loop": "{{ messages[0].content }}",
    "last": LOOP + "{% if loop.last %}x{% endif %}{{ message.content }}{% endfor %}",
    "next": LOOP + "{{ loop.nextitem }}{% endfor %}",
    "index": LOOP + "{{ loop.index0 }}{% endfor %}",
    "length": LOOP + "{{ messages | length }}{% endfor %}",
    "latest": LOOP + "{{ messages[-1].content }}{% endfor %}",
    "message ahead": LOOP + "{{ messages[loop.index0 + 1].role }}{% endfor %}",
    "two back": LOOP + "{{ messages[loop.index0 - 2].role }}{% endfor %}",
    "back in an inner loop": LOOP
    + "{% for c in message.calls %}{{ messages[loop.index0 - 1].role }}{% endfor %}{% endfor %}",
    "sliced": "{% set messages = messages[1:] %}" + LOOP + "{{ message.content }}{% endfor %}",
    "alias": "{% set all = messages %}" + LOOP + "{{ all[-1] }}{% endfor %}",
    "filtered": "{% for message in messages if message.role %}{{ message.content }}{% endfor %}",
    "reversed": "{% for message in messages | reverse %}{{ message.content }}{% endfor %}",
    "two loops": LOOP + "{{ message.role }}{% endfor %}" + LOOP + "x{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}"
    + LOOP
    + "{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
    "date": LOOP + "{{ strftime_now('%d') }}{% endfor %}",
    "cycler": "{% set c = cycler(1, 2) %}" + LOOP + "{{ c.next() }}{% endfor %}",
    "cycle": LOOP + "{{ loop.cycle(1, 2) }}{% endfor %}",
    "random": LOOP + "{{ message.content | random }}{% endfor %}",
    "loop given away": "{% macro m(l) %}{{ l.last }}{% endmacro %}"
    + LOOP
    + "{{ m(loop) }}{% endfor %}",
    "macro looks": "{% macro m() %}{{ messages[-1] }}{% endmacro %}"
    + LOOP
    + "{{ m() }}{% endfor %}",
    "break": LOOP + "{% break %}{% endfor %}",
    "in a condition": "{% if x %}" + LOOP + "{{ message.role }}{% endfor %}{% endif %}",
    "asks in the loop": LOOP
    + "{{ message.role }}{% if loop.first and add_generation_prompt %}!{% endif %}{% endfor %}",
    "asks in a macro": "{% macro m(x) %}{{ x }}{{ add_generation_prompt }}{% endmacro %}"
    + LOOP
    + "{{ m(message.role) }}{% endfor %}",
    "asks under another name": "{% set asks = add_generation_prompt %}"
    + LOOP
    + "{{ message.role }}{{ asks }}{% endfor %}",
    "asks at the beginning": "{% if add_generation_prompt %}>{% endif %}"
    + LOOP
    + "{{ message.role }}{% endfor %}",
    "an end": LOOP + "{{ message.role }}{% endfor %}{{ '>' if add_generation_prompt else '.' }}",
    "another end": LOOP
    + "{{ message.role }}{% endfor %}{% if add_generation_prompt %}>{% else %}.{% endif %}",
    "text behind": LOOP + "{{ message.role }}{% endfor %}.",
    "after it": LOOP + "{{ message.role }}{% endfor %}{{ messages[-1].role }}",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_templates(name: str) -> None:
    assert is_append_only(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_templates(name: str) -> None:
    assert not is_append_only(BAD[name])


class Template:
    """A template as transformers compiles it."""

    def __init__(self, source: str, **options: Any) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self.compiled = environment.from_string(source)
        self.options = options

    def __call__(self, messages: Sequence[Any], asks: bool) -> str:
        return self.compiled.render(
            messages=list(messages), add_generation_prompt=asks, **self.options
        )


def random_message(rng: random.Random) -> dict[str, Any]:
    role = rng.choice(["user", "assistant", "tool", "system"])
    made: dict[str, Any] = {"role": role, "content": rng.choice(["", " a ", "b\nc", "{{ x }}"])}
    if role == "assistant" and rng.random() < 0.5:
        call = {"function": {"name": "f", "arguments": {"n": rng.random()}}}
        made["tool_calls"] = [call] * rng.randint(1, 3)
        made["reasoning"] = rng.choice([None, "thought"])
    return made


@pytest.mark.parametrize("name", GOOD)
def test_a_continued_text_is_the_full_one(name: str) -> None:
    rng = random.Random(name)
    for _ in range(200):
        template = Template(GOOD[name], tools=rng.choice([None, [{"name": "f"}]]))
        messages = [random_message(rng) for _ in range(rng.randint(2, 8))]
        body = template(messages, False)
        for _ in range(4):
            num_known = len(messages)
            messages = copy.deepcopy(messages)
            messages += [random_message(rng) for _ in range(rng.randint(0, 3))]
            continued = continued_text(template, messages, body, num_known)
            assert continued == template(messages, False)
            prompt = generation_prompt(template, messages)
            assert prompt is not None
            assert continued + prompt == template(messages, True)
            body = continued

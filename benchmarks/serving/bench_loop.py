# SPDX-License-Identifier: Apache-2.0
"""How long one request can hold the API server's event loop with ``--stateful-tool-call-check``.

    python -m benchmarks.serving.bench_loop [--repeats 3] [--only WORD]

Makes requests of up to 2 MB that are made to be slow, and does with each what the server does on
its event loop: the plan, and a look at each token of each answer. Prints for each the longest time
that nothing else could run; with several answers, their tokens of one step are one block, as in
vLLM's output processor. What stock vLLM does (parsing the request, detokenizing) is not in it.
"""

import argparse
import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["VLLM_STATEFUL_TOOL_CALL_CHECK"] = "strict"

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager

from vllm_stateful.adapters.frontend import tool_call_plan
from vllm_stateful.answer.compiled_schema import compile_schema
from vllm_stateful.answer.partial_schema import MAX_STEPS, Steps, objection
from vllm_stateful.answer.tool_call_stream import ToolCallStream

MB = 1_000_000
TOKEN = 4
"""Characters."""

REAL_STEPS, STEP_S = 80, 0.005
"""So many steps of the engine take their time: what another thread compiles is done in it. The
others follow at once."""

SMALL = '{"a": 1, "b": [1, 2, {"a": "x"}], "d": "' + "x" * 400 + '", "c": "text"}'
ANY: dict[str, Any] = {}


class Case(NamedTuple):
    """One request, and what the model answers."""

    name: str
    schema: Any
    arguments: str = SMALL
    num_answers: int = 1
    num_tools: int = 1
    text: str = ""
    """Of the answer, where it is no call with the arguments."""


def doubled(depth: int, key: str, member: str = "", fits: bool = True) -> Any:
    """Each definition means the next one twice; the last one fits no text where ``fits`` is not."""
    defs: dict[str, Any] = {str(depth): {"type": "string" if fits else "integer"}}
    for level in range(depth):
        next_one: Any = {"$ref": f"#/$defs/{level + 1}"}
        branches = [{member: next_one} if member else next_one] * 2
        defs[str(level)] = {key: branches}
    return {"$defs": defs, "properties": {"c": {"$ref": "#/$defs/0"}}}


def nested(depth: int, inner: Any, key: str = "properties") -> Any:
    for _ in range(depth):
        inner = {key: {"a": inner} if key == "properties" else [inner]}
    return inner


def long_pointers(num: int, length: int) -> Any:
    """As many references, each to the same place by another long string."""
    inner: Any = {"type": "string"}
    for level in range(length // 2):
        inner = {"~": inner, "level": level}
    refs = [{"$ref": "#/$defs" + "/~0" * (length // 2)} for _ in range(num)]
    return {"$defs": inner, "properties": {"c": {"allOf": refs}}}


def numbered(num: int, make: Callable[[int], Any]) -> dict[str, Any]:
    return {f"property {place}": make(place) for place in range(num)}


def cases() -> Iterator[Case]:
    yield Case("allOf of $ref, 2^24", doubled(24, "allOf"))
    yield Case("anyOf of $ref, 2^24", doubled(24, "anyOf"))
    yield Case("anyOf that does not fit", doubled(24, "anyOf", fits=False))
    yield Case("anyOf of items, 2^24", doubled(24, "anyOf", "items"), f'{{"c": {"[" * 30}')
    yield Case("allOf, 128 answers", doubled(24, "allOf"), num_answers=128)
    yield Case("allOf in a circle", {"allOf": [{"$ref": "#"}] * 2})
    yield Case("allOf, 150 deep", nested(150, {"type": "object"}, "allOf"))
    yield Case("properties, 60 deep", nested(60, ANY), '{"a": ' * 60)
    yield Case("1400 $ref, 1000 long", long_pointers(1_400, 500))
    yield Case("60 $ref, 1000 long", long_pointers(60, 500))
    yield Case("one $ref, 2 MB", {"$ref": "#/" + "%7e0/" * (2 * MB // 5)})
    yield Case("one $ref, 1 KB of escapes", {"$ref": "#/" + "%7e" * 340})
    enum = [f"value {place}" for place in range(150_000)]
    yield Case("enum of 150 000", {"properties": {"c": {"enum": enum}}})
    yield Case("enum of 15 000", {"properties": {"c": {"enum": enum[:15_000]}}})
    yield Case("enum of 15 000 numbers", {"items": {"enum": [*range(15_000)]}}, "[20000" * 20)
    yield Case("enum of 200 numbers", nested(2, {"enum": [*range(200)]}), '{"a": {"a": 999' * 9)
    same = [{"enum": ["x" * 15_000 + f"{place}"]} for place in range(120)]
    yield Case("anyOf of long texts", {"additionalProperties": {"anyOf": same}}, long_text(15_003))
    yield Case("const of 1 MB", {"properties": {"c": {"const": "x" * MB}}})
    many = {"additionalProperties": {"anyOf": [{"type": "integer"}] * 200}}
    yield Case("anyOf of 200, long text", many, long_text(250_000))
    lists = {"b": [{"a": [place]} for place in range(5_000)]}
    yield Case("const of objects", {"const": lists}, json.dumps(lists))
    limits = {"minimum": 0, "maximum": 9, "exclusiveMinimum": -1, "exclusiveMaximum": 10}
    yield Case("limits", {"items": {"allOf": [limits] * 50}}, json.dumps([1] * 9_000))
    yield Case("properties, 30 000", {"properties": numbered(30_000, lambda _: {"type": "string"})})
    yield Case("properties, 3 000", {"properties": numbered(3_000, lambda _: {"type": "string"})})
    large = {"properties": numbered(3_000, lambda _: {"type": "string"})}
    yield Case("properties, while compiled", large, long_text(20_000))
    yield Case("properties, 80", {"properties": numbered(80, lambda _: {"type": "string"})})
    yield Case("required, 100 000", {"required": [str(place) for place in range(100_000)]})
    yield Case("required, 16 000", {"required": ["a"] * 16_000}, '{"a": 1}')
    yield Case("type, 200 000", {"type": ["object"] * 200_000})
    yield Case("description of 2 MB", {"type": "object", "description": "x" * 2 * MB})
    yield Case("30 000 tools", ANY, num_tools=30_000)
    yield Case("500 tools of 4 KB", {"properties": numbered(80, lambda _: ANY)}, num_tools=500)
    for name, arguments in texts():
        yield Case(f"256 KB of {name}", ANY, arguments)
    yield Case("64 KB of numbers, judged", {"items": {"type": "string"}}, json.dumps([1] * 20_000))
    yield Case("4 KB, 128 answers", {"items": {"type": "integer"}}, json.dumps([1] * 1_300), 128)
    yield Case("objects, 128 answers", ANY, json.dumps([{"a": {}}] * 600), 128)
    name = f"[{'[],' * 80_000}1]"
    yield Case("name of 240 KB", ANY, text=f'<tool_call>{{"name": {name}, "arguments": 1}}')
    yield Case("text of 1 MB", ANY, text="x" * MB)


def long_text(length: int) -> str:
    return json.dumps({"a": "x" * length})


def texts() -> Iterator[tuple[str, str]]:
    """Arguments of calls just below the limit, that are slow to parse in one way or another."""
    for name, piece in (
        ("objects", "{},"),
        ("pairs", '{"a":1},'),
        ("lists", "[],"),
        ("numbers", "1,"),
        ("floats", "0.1234567890123456789,"),
        ("powers", "1e300,"),
        ("long numbers", "1" * 4_200 + ","),
        ("strings", '"",'),
        ("open brackets", "["),
    ):
        yield name, "[" + piece * (260_000 // len(piece)) + "1]"
    yield "one string", long_text(260_000)
    yield "escapes", '{"a": "' + "\\n" * 130_000 + '"}'
    yield "a key", '{"' + "x" * 260_000 + '": 1}'
    yield "white space", " " * 260_000 + "{}"


def server() -> Any:
    parser = ParserManager.get_parser("hermes", None, True)
    state = SimpleNamespace(openai_serving_chat=SimpleNamespace(parser_cls=parser))
    return SimpleNamespace(headers={}, app=SimpleNamespace(state=state))


def request(case: Case) -> Any:
    tools = [
        {"type": "function", "function": {"name": f"t{place}", "parameters": case.schema}}
        for place in range(case.num_tools)
    ]
    messages = [{"role": "user", "content": "Hi"}]
    return ChatCompletionRequest(messages=messages, tools=tools)


class Longest:
    """The longest time that nothing else could run, in ms."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.what = ""

    def timed(self, what: str, work: Callable[[], Any]) -> Any:
        """Do it, and return what it returns."""
        wall, cpu = time.perf_counter(), time.thread_time()
        found = work()
        cpu, wall = 1e3 * (time.thread_time() - cpu), 1e3 * (time.perf_counter() - wall)
        if cpu > self.cpu:
            self.what = what
        self.wall, self.cpu = max(self.wall, wall), max(self.cpu, cpu)
        return found


def look(answers: list[ToolCallStream], text: str) -> list[Any]:
    """At the text so far of each answer, as when one step of the engine has come."""
    return [one.look(text) for one in answers]


def play(case: Case, made: Any, http: Any) -> tuple[Longest, Counter[str]]:
    """One request from its plan to the end of its answers, and what became of the calls."""
    longest = Longest()
    plan = longest.timed("plan", lambda: tool_call_plan.plan_of(made, http))
    if plan is None:
        return longest, Counter(["no plan"])
    answers = [
        longest.timed("begin", lambda: plan.stream(strict=True, reasoning_ended=True))
        for _ in range(case.num_answers)
    ]
    text = case.text or f'<tool_call>{{"name": "t0", "arguments": {case.arguments}}}</tool_call>'
    live = answers
    for num, end in enumerate(range(TOKEN, len(text) + TOKEN, TOKEN)):
        found = longest.timed("look", partial(look, live, text[:end]))
        live = [one for one, verdict in zip(live, found, strict=True) if verdict is None]
        if not live:
            break
        if num < REAL_STEPS:
            time.sleep(STEP_S)
    results: Counter[str] = Counter()
    for one in answers:
        longest.timed("finish", one.finish)
        results.update({str(key): num for key, num in one.results.items()})
        results.update({f"unchecked {key}": num for key, num in one.unchecked.items()})
    return longest, results


def step_rate() -> str:
    """How long a judgement takes that uses up its steps."""
    said = []
    for name, schema in (("allOf", doubled(24, "allOf")), ("anyOf", doubled(24, "anyOf"))):
        compiled, steps = compile_schema(schema), Steps(MAX_STEPS)
        begin = time.perf_counter()
        try:
            objection(compiled, {"c": "text"}, 0, steps)
        except ValueError:
            took = 1e6 * (time.perf_counter() - begin)
            said.append(f"{name}: {steps.used} steps in {took / 1e3:.1f} ms")
    return "; ".join(said)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many is shown")
    parser.add_argument("--only", default="", help="requests whose name has this in it")
    args = parser.parse_args()
    http = server()
    gc.collect()
    gc.freeze()  # as the server does
    print(step_rate())
    print(f"{'request':28} {'KB':>6} {'longest ms':>10} {'cpu ms':>8}  in      became")
    for case in cases():
        if args.only not in case.name:
            continue
        made = request(case)
        size = len(json.dumps(case.schema)) * case.num_tools // 1000
        runs = []
        for _ in range(args.repeats):
            gc.collect()
            runs.append(play(case, made, http))
        wall = min(longest.wall for longest, _ in runs)
        longest, results = min(runs, key=lambda run: run[0].cpu)
        became = ", ".join(f"{num} {name}" for name, num in results.items()) or "nothing to say"
        times = f"{wall:10.2f} {longest.cpu:8.2f}  {longest.what:6}"
        print(f"{case.name:28} {size:6} {times}  {became}", flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Tokens that a turn computes where the history comes back changed, without a model.

    python -m benchmarks.families.histories [--families a,b] [--styles a,b] [--out DIR]

Recorded conversations, written anew for each turn by chat templates (`recorded_turns`), run through
vLLM's scheduler and KV cache manager (`modelless`): stock, stock at its best, and with the plugin.
Eight conversations at a time, one turn of each; nothing is ever evicted. DIR gets every turn, and
the tables are of all that DIR has, so a long run can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.families.modelless import SHAPES, Engine, Setting, Shape
from benchmarks.families.recorded_turns import SOURCES, STYLES, Ids, Talk, Text, talks, text_of
from benchmarks.models import CACHE, ROOT
from benchmarks.serving.tables import markdown, ratio

AT_ONCE = 8
UNIT = 16
STOCK, PLUGIN, TUNED = "stock", "plugin", "plugin dense"


@dataclass
class Played:
    """One turn. `computed` is by side, in tokens of the prompt."""

    talk: str
    turn: int
    prompt: int
    answer: int
    least: int = 0
    computed: dict[str, int] = field(default_factory=dict)


def sides(shape: Shape) -> dict[str, Setting]:
    """By name: stock's defaults, and what it may do better with. The plugin on both."""
    found = {STOCK: Setting()}
    if shape.states:
        found["stock dense"] = Setting(None, None)
        found["stock unit"] = Setting(UNIT, 0)
        found["stock unit dense"] = found[TUNED] = Setting(UNIT, None)
    elif shape.windows:
        found["stock dense"] = found[TUNED] = Setting(None, None)
    return found | {PLUGIN: Setting()}


def waves(recorded: Sequence[Talk]) -> list[list[tuple[int, int]]]:
    """Which turns run at the same time: conversation and turn."""
    waiting = list(range(len(recorded)))
    running: list[tuple[int, int]] = []
    made = []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append((waiting.pop(0), 0))
        running = [(talk, turn) for talk, turn in running if turn < len(recorded[talk].turns)]
        if running:
            made.append(list(running))
        running = [(talk, turn + 1) for talk, turn in running]
    return made


def blank(recorded: Sequence[Talk]) -> list[Played]:
    """All turns in the order in which they are played, with the least that each can compute.

    That is the prompt behind what it has in common with any prompt and answer that ended before,
    or with a prompt that runs at the same time and came earlier.
    """
    made, known = [], list[Ids]()
    for wave in waves(recorded):
        ended = len(known)
        for talk, number in wave:
            turn = recorded[talk].turns[number]
            shared = max((_num_shared(turn.prompt, each) for each in known), default=0)
            least = max(1, len(turn.prompt) - shared)
            sizes = len(turn.prompt), len(turn.answer)
            made.append(Played(recorded[talk].name, number, *sizes, least))
            known.append(turn.prompt)
        for place, (talk, number) in enumerate(wave, ended):
            known[place] = np.concatenate([known[place], recorded[talk].turns[number].answer])
    return made


def _num_shared(one: Ids, other: Ids) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def play(
    name: str, engine: Engine, recorded: Sequence[Talk], text: Text, turns: Sequence[Played]
) -> None:
    """Run all turns on one side, and write down what each computed."""
    order = iter(turns)
    for wave in waves(recorded):
        requests = []
        for talk, number in wave:
            turn = recorded[talk].turns[number]
            said = turn.prompt.tolist(), turn.answer.tolist()
            requests.append(engine.add(f"{talk}-{number}", *said, text.ends))
        engine.run()
        for request in requests:
            played = next(order)
            assert request.num_output_tokens == played.answer
            assert request.num_preemptions == 0
            played.computed[name] = played.prompt - engine.cached[request.request_id]
    if engine.was_full:
        raise RuntimeError(f"{name}: the cache was too small")


def play_family(
    family: str, style: str, recorded: Sequence[Talk], text: Text, num_blocks: int
) -> dict[str, Any]:
    """All sides of one family with one template."""
    shape = SHAPES[family]
    turns = blank(recorded)
    seen: dict[str, Any] = {}
    off: dict[str, str] = {}
    for name, setting in sides(shape).items():
        is_stateful = name.startswith(PLUGIN)
        started = time.perf_counter()
        engine = Engine(shape, num_blocks, setting, is_stateful=is_stateful, tokenizer=text)
        play(name, engine, recorded, text, turns)
        if is_stateful and engine.scheduler.stateful_off is not None:
            off[name] = engine.scheduler.stateful_off
        elif name == PLUGIN:
            seen = _seen(engine)
        print(f"{style} {family} {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    played = [asdict(each) for each in turns]
    return {"family": family, "style": style, "turns": played, "off": off, **seen}


def _seen(engine: Engine) -> dict[str, Any]:
    manager = engine.scheduler.kv_cache_manager
    demoted = {str(why): count for why, count in manager.store.demotions.items() if count}
    return {"points": manager.resume_points.counts(), "demoted": demoted}


HEAD = ("template", "family", "turns", "stock", "stock best", "with", "plugin", "plugin dense")
RATIOS = ("least", "best / plugin", "over least", "ratio")


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """Sum and median over all turns but the first ones of conversations.

    ``over least``: what stock at its best and the plugin computed more than the least, in sum.
    ``plugin dense``: the plugin with the setting that keeps most, for stock and the plugin alike.
    """
    return markdown(HEAD + RATIOS, [_row(document) for document in documents])


def _row(document: Mapping[str, Any]) -> list[str]:
    later = [each for each in document["turns"] if each["turn"]]
    names = list(later[0]["computed"])
    computed = {name: [each["computed"][name] for each in later] for name in names}
    stocks = (name for name in names if not name.startswith(PLUGIN))
    best = min(stocks, key=lambda name: sum(computed[name]))
    least = [each["least"] for each in later]
    tuned = computed.get(TUNED, computed[PLUGIN])
    columns = [computed[STOCK], computed[best], computed[PLUGIN], tuned, least]
    stock, stock_best, *ours = (f"{sum(c)} / {median(c):g}" for c in columns)
    for place, name in enumerate((PLUGIN, TUNED)):
        ours[place] += " (off)" if name in document["off"] else ""
    cells = [document["style"], document["family"], str(len(later)), stock, stock_best]
    cells += [best.removeprefix("stock").strip() or "defaults", *ours]
    done = sum(computed[best]), sum(computed[PLUGIN])
    more = [each - sum(least) for each in done]
    return [*cells, ratio(*done), f"{more[0]} / {more[1]}", ratio(*more)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.families.histories", description=__doc__)
    parser.add_argument("--families", default=",".join(SHAPES), help="names, with commas between")
    parser.add_argument("--styles", default=",".join(STYLES), help="names, with commas between")
    parser.add_argument("--sources", default=",".join(SOURCES), help="names, with commas between")
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--model", type=Path, default=CACHE / "smollm2-135m", help="its tokenizer")
    parser.add_argument("--blocks", type=int, default=0, help="of the cache; 0: enough")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "histories")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sources = {name: SOURCES[name] for name in options.sources.split(",")}
    for style in options.styles.split(","):
        text = text_of(STYLES[style], options.model)
        recorded = talks(style, options.traces, text, sources)
        for family in options.families.split(","):
            num_blocks = options.blocks or enough(SHAPES[family], recorded)
            document = play_family(family, style, recorded, text, num_blocks)
            (options.out / f"{style}.{family}.json").write_text(json.dumps(document) + "\n")
    found = [options.out / f"{style}.{family}.json" for style in STYLES for family in SHAPES]
    text_table = table([json.loads(path.read_text()) for path in found if path.exists()])
    (options.out / "tables.md").write_text(text_table + "\n")
    print(text_table)


def enough(shape: Shape, recorded: Sequence[Talk]) -> int:
    """Blocks for every turn as if none shared anything, twice: half of them may be pinned."""
    sizes = [len(t.prompt) + len(t.answer) for talk in recorded for t in talk.turns]
    blocks = sum(size // shape.block + 4 for size in sizes)
    return 2 * blocks * (1 + shape.windows + shape.states)


if __name__ == "__main__":
    main()

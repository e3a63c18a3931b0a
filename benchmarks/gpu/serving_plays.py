# SPDX-License-Identifier: Apache-2.0
"""The parts of `benchmarks.gpu.serving`, each a row for every turn as soon as it was played."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.limited import append_row
from benchmarks.gpu.serving_client import TimeIsUpError, ask
from benchmarks.gpu.serving_sides import MODEL_NAME, Side, SideFailedError
from benchmarks.gpu.serving_text import Talk, Tokens
from benchmarks.serving.client import RequestFailedError, encode_body
from benchmarks.serving.recorded import Message

LONG, AGENTS, TOGETHER = "long", "agents", "together"
MOST_TURN_S = 60.0
COUNTERS = {
    "generated": "vllm:generation_tokens_total",
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}
Row = dict[str, Any]


class Stage:
    """The sides that play, and where their rows go.

    Args:
        pause: Seconds before each request that is played alone.
        say: Gets a line now and then.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        tokens: Tokens,
        rows: Path,
        pause: float,
        say: Callable[[str], None],
    ) -> None:
        self._sides = list(sides)
        self._tokens = tokens
        self._rows = rows
        self._pause = pause
        self.say = say

    def playing(self, names: Sequence[str] | None = None) -> list[Side]:
        """The sides that have not failed."""
        return [
            side for side in self._sides if not side.failed and (not names or side.name in names)
        ]

    def write(self, **row: Any) -> None:
        """Add a row."""
        append_row(self._rows, row)

    def fail(self, side: Side, part: str, problem: str) -> None:
        """A side plays no more; the others go on."""
        if not side.failed:
            side.failed = problem
            side.close()
            self.write(part=part, side=side.name, failed=problem)
            self.say(f"{part}: {side.name} failed, the rest goes on: {problem[:300]}")

    def forget(self, part: str) -> None:
        """Every side begins the next part with an empty cache; one that is not is said."""
        for side in self.playing():
            try:
                side.check_alive()
                if not side.forget():
                    self.write(part="forget", side=side.name, after=part, problem="not emptied")
            except SideFailedError as error:
                self.fail(side, part, str(error))

    def warm_up(self, talks: Sequence[Talk], until: float) -> None:
        """Kernels are compiled when they first run: alone, and many at once. Not timed."""
        first, *_ = talks

        def warm(side: Side) -> None:
            for _ in self._talk("warm-up", side, first.named("warm"), 2, until):
                pass
            with ThreadPoolExecutor(len(talks)) as threads:
                runs = [
                    threads.submit(
                        list, self._talk("warm-up", side, talk.named("warm at once"), 1, until)
                    )
                    for talk in talks
                ]
                for run in runs:
                    run.result()

        with ThreadPoolExecutor(len(self._sides)) as threads:
            list(threads.map(warm, self.playing()))

    def long(self, talk: Talk, names: Sequence[str], until: float) -> None:
        """One long session, turn by turn on every side, nothing else running."""
        self._turn_about(LONG, talk.named(LONG), names, until)
        self.plugin_metrics(LONG)

    def agents(self, talks: Sequence[Talk], until: float) -> None:
        """Recorded conversations, one after the other, turn by turn on every side."""
        for talk in talks:
            if time.monotonic() > until:
                break
            before = {side.name: self._counted(side, AGENTS) for side in self.playing()}
            self._turn_about(AGENTS, talk.named(AGENTS), None, until)
            for side in self.playing():
                counts, old = self._counted(side, AGENTS), before[side.name]
                drafts = {name: counts[name] - old[name] for name in counts if name in old}
                if drafts:
                    self.write(
                        part="drafts", side=side.name, kind=talk.kind, talk=talk.name, **drafts
                    )
        self.plugin_metrics(AGENTS)

    def together(self, talks: Sequence[Talk], num_turns: int, until: float) -> None:
        """All at once, each as fast as it is answered, on one side at a time."""
        for place, side in enumerate(sides := self.playing()):
            left = until - time.monotonic()
            if left <= 0:
                break
            ends = time.monotonic() + left / (len(sides) - place)
            began = time.monotonic()
            with ThreadPoolExecutor(len(talks)) as threads:
                runs = [
                    threads.submit(
                        list, self._talk(TOGETHER, side, talk.named(TOGETHER), num_turns, ends)
                    )
                    for talk in talks
                ]
                rows = [row for run in runs for row in run.result()]
            done = [row for row in rows if "total_ms" in row]
            for row in rows:
                self.write(**row)
            self.write(
                part="wall",
                side=side.name,
                sessions=len(talks),
                turns=len(done),
                is_whole=len(done) == sum(min(num_turns, len(talk.turns)) for talk in talks),
                seconds=time.monotonic() - began,
                made=sum(row["made"] for row in done),
            )
            self.say(f"{TOGETHER}: {side.name}, {len(done)} turns")
        self.plugin_metrics(TOGETHER)

    def plugin_metrics(self, part: str) -> None:
        """What the plugin counted so far, for whoever wonders about a figure."""
        for side in self.playing():
            if not side.name.startswith("plugin"):
                continue
            try:
                found = side.metrics()
            except SideFailedError as error:
                self.fail(side, part, str(error))
                continue
            counted = {k: v for k, v in found.items() if k.startswith("vllm_stateful") and v}
            self.write(
                part="metrics",
                side=side.name,
                after=part,
                values={k: v for k, v in counted.items() if "_created" not in k},
            )

    def _counted(self, side: Side, part: str) -> dict[str, float]:
        try:
            found = side.metrics()
        except SideFailedError as error:
            self.fail(side, part, str(error))
            return {}
        return {short: found.get(name, 0.0) for short, name in COUNTERS.items()}

    def _turn_about(self, part: str, talk: Talk, names: Sequence[str] | None, until: float) -> None:
        """Each turn on all sides; another side is the first each time."""
        messages: list[Message] = [talk.system]
        for number, turn in enumerate(talk.turns):
            messages += turn.new
            sides = self.playing(names)
            first = number % len(sides) if sides else 0
            for side in (*sides[first:], *sides[:first]):
                time.sleep(self._pause)
                if time.monotonic() > until:
                    return
                row = self._ask(part, side, talk, number, messages, until)
                if row:
                    self.write(**row)
            messages.append({"role": "assistant", "content": turn.answer})

    def _talk(
        self, part: str, side: Side, talk: Talk, num_turns: int, until: float
    ) -> Iterator[Row]:
        """One conversation on one side."""
        messages: list[Message] = [talk.system]
        for number, turn in enumerate(talk.turns[:num_turns]):
            messages += turn.new
            if side.failed or time.monotonic() > until:
                return
            row = self._ask(part, side, talk, number, messages, until)
            if row:
                yield row
            messages.append({"role": "assistant", "content": turn.answer})

    def _ask(
        self,
        part: str,
        side: Side,
        talk: Talk,
        number: int,
        messages: Sequence[Message],
        until: float,
    ) -> Row | None:
        """Play one turn; the recorded answer goes on in the history, whatever was said."""
        answer = talk.turns[number].answer
        pinned = self._tokens.answer(answer)
        body = encode_body(
            MODEL_NAME,
            list(messages),
            len(pinned),
            session_id=f"{part} {talk.name} {talk.system['content'][:24]}",
            vllm_xargs={"pinned_ids": pinned},
        )
        own = time.monotonic() + MOST_TURN_S
        row: Row = {"part": part, "side": side.name, "kind": talk.kind, "talk": talk.name}
        try:
            found = ask(side.port, body, min(own, until))
        except TimeIsUpError:
            if until < own:  # of the part: nothing is wrong with the side
                return {**row, "turn": number, "cut": True}
            self.fail(side, part, side.report(f"no answer within {MOST_TURN_S:.0f} s"))
            return None
        except (RequestFailedError, OSError) as error:
            problem = f"{type(error).__name__}: {str(error)[:600]}"
            self.fail(side, part, side.report(problem))
            return None
        gaps = [
            round((later - earlier) * 1000, 3)
            for earlier, later in zip(found.text_s, found.text_s[1:], strict=False)
        ]
        return {
            **row,
            "turn": number,
            "ttft_ms": round(found.first_s * 1000, 3),
            "total_ms": round(found.end_s * 1000, 3),
            "prompt": found.num_prompt,
            "cached": found.num_cached,
            "made": found.num_made,
            "equal": found.text == answer,
            **({"gaps_ms": gaps} if part == TOGETHER else {}),
        }

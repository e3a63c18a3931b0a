# SPDX-License-Identifier: Apache-2.0
"""The tables: one a workload, and one of what stock differs by from itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.families.workloads import SESSIONS, TURNS, WORKLOADS, Turn, Workload
from benchmarks.serving.tables import markdown

HEAD = (
    "family",
    "groups",
    "stock",
    "best stock",
    "with",
    "plugin",
    "best = stock",
    "plugin = stock",
)


def tables(documents: Sequence[dict[str, Any]]) -> str:
    """Everything in Markdown. A document is what one family's sides did."""
    started = [each for each in documents if "error" not in each["sides"]["stock"]]
    parts = [_workload(workload, started) for workload in WORKLOADS]
    parts.append(_chunked(started))
    parts.append(_remarks(documents))
    return "\n\n".join(part for part in parts if part) + "\n"


def _workload(workload: Workload, documents: Sequence[dict[str, Any]]) -> str:
    rows = [_row(workload, document) for document in documents]
    least = workload.least * SESSIONS * (TURNS - 1)
    return (
        f"### {workload.name}\n\n"
        f"Tokens computed: median of turns 2 to {TURNS} / their sum / sum of the first turns. At "
        f"least {workload.least} / {least} / {workload.least_first}. Last columns: answers equal, "
        f"largest difference of a first token's log-probability; both where prompts are equal.\n\n"
        + markdown(HEAD, rows)
    )


def _row(workload: Workload, document: dict[str, Any]) -> list[str]:
    sides = document["sides"]
    stock = turns_of(sides["stock"], workload)
    best_name = best_side(sides, workload)
    best = turns_of(sides[best_name], workload)
    cells = [document["family"], groups(sides["stock"]), computed(stock)]
    cells += [computed(best), _arguments(sides[best_name]["engine_args"])]
    equal_best = "-" if best_name == "stock" else compared(stock, best)
    if "error" in sides["plugin"]:
        return [*cells, "failed", equal_best, "-"]
    plugin = turns_of(sides["plugin"], workload)
    mark = " (off)" if "off" in sides["plugin"] else ""
    return [*cells, computed(plugin) + mark, equal_best, compared(stock, plugin)]


def turns_of(side: dict[str, Any], workload: Workload) -> list[Turn]:
    return [Turn(*each) for each in side["played"][workload.name]]


def best_side(sides: dict[str, Any], workload: Workload) -> str:
    """The stock side that computed the fewest tokens, first turns included."""
    names = [n for n in sides if n.startswith("stock") and "error" not in sides[n]]
    return min(names, key=lambda n: sum(turn.computed for turn in turns_of(sides[n], workload)))


def computed(turns: Sequence[Turn]) -> str:
    later = [turn.computed for turn in turns if turn.turn]
    first = sum(turn.computed for turn in turns if not turn.turn)
    return f"{median(later):g} / {sum(later)} / {first}"


def compared(stock: Sequence[Turn], other: Sequence[Turn]) -> str:
    """Equal answers of those to equal prompts, and the largest difference of a log-probability."""
    pairs = [(a, b) for a, b in zip(stock, other, strict=False) if a.prompt_crc == b.prompt_crc]
    equal = sum(a.answer == b.answer for a, b in pairs)
    off_by = max(abs(a.logprob - b.logprob) for a, b in pairs)
    yes = "yes" if equal == len(stock) else f"{equal} of {len(pairs)}"
    return f"{yes}, {off_by:.1e}" if off_by else f"{yes}, 0"


def groups(side: dict[str, Any]) -> str:
    """Such as `2 SlidingWindow(64)/128 + 1 FullAttention/128`: window and block size in tokens."""
    names = Counter(
        each["spec"].removesuffix("Spec")
        + (f"({each['window']})" if each["window"] else "")
        + f"/{each['block_size']}"
        for each in side["groups"]
    )
    text = " + ".join(f"{count} {name}" for name, count in names.items())
    return text if side["prefix_caching"] else f"{text}, no prefix cache"


def _arguments(engine_args: dict[str, Any]) -> str:
    short = {"prefix_match_unit": "unit", "prefix_cache_retention_interval": "retention"}
    return ", ".join(f"{short.get(k, k)} {v}" for k, v in engine_args.items()) or "defaults"


def _chunked(documents: Sequence[dict[str, Any]]) -> str:
    """What stock differs by from itself when the same prompts are computed in smaller chunks."""
    rows = [
        _chunked_row(document, side)
        for document in documents
        for name, side in document["sides"].items()
        if name.startswith("chunked") and "error" not in side
    ]
    if not rows:
        return ""
    head = ("family", "dtype", "tokens a step", "against", "answers equal, log-probability off by")
    return "### Stock against stock: the same first prompts in other chunks\n\n" + markdown(
        head, rows
    )


def _chunked_row(document: dict[str, Any], side: dict[str, Any]) -> list[str]:
    stock = document["sides"]["stock"]
    both: list[list[Turn]] = [[], []]
    for workload in WORKLOADS:
        if not workload.shared:  # a prompt that is found in the cache is cut another way
            for turns, each in zip(both, (stock, side), strict=True):
                turns += [turn for turn in turns_of(each, workload) if not turn.turn]
    sizes = [str(each["max_num_batched_tokens"]) for each in (stock, side)]
    return [document["family"], document["dtype"], *sizes, compared(*both)]


def _remarks(documents: Sequence[dict[str, Any]]) -> str:
    """Sides that did not end well, and families that the plugin leaves to stock."""
    lines = []
    for document in documents:
        for name, side in document["sides"].items():
            said = side.get("error") or side.get("off")
            if said:
                lines.append(f"- {document['family']}, {name}: {said}")
    return "\n".join(lines)

# SPDX-License-Identifier: Apache-2.0
"""Memory and metrics of the servers while they are soaked, and what is left at the end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.reliability.soak_servers import SoakServer

EVERY_S = 5.0
PAGE_MIB = 4096 / 2**20
FREE_WITHIN_S = 20.0

MUST_BE_ZERO = (
    "vllm_stateful_blocks_pinned",
    "vllm_stateful_sessions",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)
TOLD = (
    "vllm_stateful_blocks_pinned",
    "vllm_stateful_sessions",
    "vllm_stateful_response_cache_bytes",
    "vllm_stateful_render_bytes",
    "vllm_stateful_turns_total",
    "vllm_stateful_demotions_total",
    "vllm_stateful_responses_total",
    "vllm_stateful_prompts_sent_total",
    "vllm_stateful_prompts_verified_total",
    "vllm_stateful_prefills_joined_total",
    "vllm_stateful_tokens_drafted_total",
    "vllm_stateful_drafts_accepted_total",
    "vllm_stateful_prompt_tokens_reused_total",
    "vllm_stateful_prompt_tokens_computed_total",
    "vllm_stateful_bypassed_turns_total",
    "vllm:num_preemptions_total",
    "vllm_stateful_engines_off",
)


@dataclass
class Watch:
    """Samples of all processes, taken while it runs.

    Attributes:
        rows: seconds since the start, MiB by side and process, and gauges.
    """

    servers: dict[str, SoakServer]
    rows: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    async def run(self) -> None:
        """Sample until cancelled."""
        began = time.monotonic()
        while True:
            row: dict[str, float] = {}
            for side, server in self.servers.items():
                for name, pid in server.processes().items():
                    row[f"{side} {name}"] = rss_mib(pid)
                found = await metrics(server.url)
                for name in ("vllm_stateful_render_bytes", "vllm_stateful_response_cache_bytes"):
                    if name in found:
                        row[f"{side} {name}"] = found[name] / 2**20
            self.rows.append((time.monotonic() - began, row))
            await asyncio.sleep(EVERY_S)

    def slopes(self) -> dict[str, float]:
        """MiB per minute over the last half, by least squares."""
        if not self.rows:
            return {}
        half = self.rows[-1][0] / 2
        late = [row for row in self.rows if row[0] >= half]
        made = {}
        for name in late[-1][1]:
            points = [(at / 60, row[name]) for at, row in late if name in row]
            made[name] = least_squares(points)
        return made

    def span(self) -> float:
        """Seconds between the first and the last sample."""
        return self.rows[-1][0] - self.rows[0][0] if self.rows else 0.0


def rss_mib(pid: int) -> float:
    """Resident memory of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB
    except OSError:
        return 0.0


def least_squares(points: list[tuple[float, float]]) -> float:
    """The slope of a line through the points; 0 for fewer than three."""
    if len(points) < 3:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


async def metrics(url: str) -> dict[str, float]:
    """Counters and gauges, summed over vLLM's labels; ours by their own label. Empty: no answer."""
    try:
        async with httpx.AsyncClient(timeout=30) as client:
            text = (await client.get(f"{url}/metrics")).text
    except httpx.HTTPError:
        return {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if not name or name.startswith("#") or "_bucket" in name:
            continue
        plain, _, labels = name.partition("{")
        if plain.startswith("vllm_stateful"):
            labels = ",".join(part for part in labels.rstrip("}").split(",") if "pid=" not in part)
            plain += f"{{{labels}}}" if labels else ""
        found[plain] = found.get(plain, 0.0) + float(value)
    return found


async def left_over(url: str) -> dict[str, float]:
    """What should be zero now and is not, waited for; metrics are polled once a second."""
    until = time.monotonic() + FREE_WITHIN_S
    await asyncio.sleep(2.5)
    while True:
        found = await metrics(url)
        left = {name: found.get(name, -1.0) for name in MUST_BE_ZERO if found.get(name, -1.0)}
        if not left or time.monotonic() > until:
            return left
        await asyncio.sleep(1)


def told(found: dict[str, float]) -> dict[str, float]:
    """The metrics that say what the load was like."""
    return {name: value for name, value in found.items() if name.partition("{")[0] in TOLD}

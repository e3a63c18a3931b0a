# SPDX-License-Identifier: Apache-2.0
"""Every option: its name, its environment variable, what is allowed, and what it does.

The command line writes the options to the environment. Child processes inherit the environment, and
every process (API server, engine core, worker) builds the same frozen ``StatefulConfig`` from it,
once.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from vllm_stateful.errors import ConfigError

ENABLE_ENV = "VLLM_STATEFUL"
"""Set to 1 by ``--plugin stateful``, or by hand for ``LLM(...)``."""

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class StatefulConfig:
    """The options of one server, validated."""

    profile: str = "exact"
    pin_fraction: float = 0.5
    idle_seconds: float = 900.0
    resume_points: int = 4
    tenant: str = "api-key"
    history: str = "retokenize"
    order: str = "arrival"
    tool_call_check: str = "off"
    verify_tokens: float = 0.01
    render_bytes: int = 1 << 30
    base_bytes: int = 1 << 29
    response_cache_bytes: int = 0
    attention: str = "auto"
    drafts: str = "auto"
    explain: str = "places"
    admin_key: str = field(default="", repr=False)
    disable: frozenset[str] = frozenset()
    strict: bool = False
    check_invariants: bool = False


class Option(NamedTuple):
    """One field of ``StatefulConfig`` as the user sees it."""

    field: str
    parse: Callable[[str], Any]
    allowed: str
    help: str
    is_flag: bool = False
    is_secret: bool = False
    """Whether its value is never shown."""

    @property
    def env(self) -> str:
        return f"{ENABLE_ENV}_{self.field.upper()}"

    @property
    def flag(self) -> str:
        return "--stateful-" + self.field.replace("_", "-")

    def read(self, text: str, key: str) -> Any:
        """Parse one value. Raises ConfigError naming ``key``, the value and what is allowed."""
        try:
            return self.parse(text)
        except ValueError:
            shown = "..." if self.is_secret else repr(text)
            raise ConfigError(f"{key}={shown}: must be {self.allowed}") from None


def _within(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse


def _whole_within(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return parse


def _key(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text.strip()


def _bytes(text: str) -> int:
    """A number of bytes, with K, M or G for powers of 1024."""
    scale = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper())
    number = int(text) if scale is None else float(text[:-1]) * (1 << scale)
    if not 0 <= number < float("inf"):
        raise ValueError(text)
    return int(number)


FEATURES = (
    "tokenize",
    "messages",
    "detokenize",
    "reasoning",
    "transport",
    "session-affinity",
    "worker-ids",
    "device-drafts",
    "shared-prefixes",
)
"""The names that ``--stateful-disable`` accepts. Each one leaves one stage to stock vLLM."""


def _features(text: str) -> frozenset[str]:
    names = frozenset(filter(None, (name.strip() for name in text.split(","))))
    if not names <= set(FEATURES):
        raise ValueError(text)
    return names


def parse_bool(text: str) -> bool:
    """Read an on/off value. Raises ValueError for anything else."""
    lowered = text.strip().lower()
    if lowered not in TRUE + FALSE:
        raise ValueError(text)
    return lowered in TRUE


PROFILES: Mapping[str, Mapping[str, str]] = {
    "exact": {},
    "fast": {"history": "generated", "tool_call_check": "end", "drafts": "on"},
}
"""What ``--stateful-profile`` sets, where the option itself is not given."""

YEAR_S = 365 * 24 * 3600.0

OPTIONS: tuple[Option, ...] = (
    Option(
        "profile",
        _one_of(*PROFILES),
        "'exact' or 'fast'",
        "Sets several options; those that are given themselves win. exact: every prompt has the "
        "token ids of stock vLLM. fast: --stateful-history generated, --stateful-tool-call-check "
        "end and --stateful-drafts on. Beside a drafting head, and on CUDA with model runner V1, "
        "vLLM refuses requests with min_p or logit_bias. Default: exact.",
    ),
    Option(
        "pin_fraction",
        _within(0.0, 1.0),
        "a number from 0 to 1",
        "Largest share of the KV cache blocks that waiting sessions may keep from the free "
        "pool. Never blocks anyone: under pressure they are given back. Default: 0.5.",
    ),
    Option(
        "idle_seconds",
        _within(1.0, YEAR_S),
        f"a number of seconds from 1 to {YEAR_S:.0f}",
        "A session that was not used for this long gives its blocks back. Default: 900.",
    ),
    Option(
        "resume_points",
        _whole_within(1, 64),
        "a whole number from 1 to 64",
        "Positions of one history that a hybrid model (sliding windows, Mamba, linear attention) "
        "can be continued at, its end included. Each takes a block of every group with states, "
        "or those of a window. One or two inside its last answer come on top. Default: 4.",
    ),
    Option(
        "tenant",
        _one_of("api-key", "cache-salt"),
        "'api-key' or 'cache-salt'",
        "What separates tenants, who never share KV: the API key together with the request's "
        "cache_salt, or the cache_salt alone (as stock vLLM). Default: api-key.",
    ),
    Option(
        "history",
        _one_of("retokenize", "generated"),
        "'retokenize' or 'generated'",
        "Token ids of earlier answers in a prompt: retokenize makes them from the rendered text, "
        "equal to stock vLLM; generated keeps the ids that the model generated, and their KV, "
        "where the text or the tool call means the same. Another input than stock vLLM's, and "
        "faster. Default: retokenize.",
    ),
    Option(
        "order",
        _one_of("arrival", "least-served"),
        "'arrival' or 'least-served'",
        "Which waiting turn is admitted next: arrival is vLLM's own order; least-served takes "
        "the session for which least was computed so far, and a turn that has waited for 30 s "
        "before all others. Not with --scheduling-policy priority. Default: arrival.",
    ),
    Option(
        "tool_call_check",
        _one_of("off", "end", "strict"),
        "'off', 'end' or 'strict'",
        "What is done with tool calls while they are generated: end ends the turn as soon as the "
        "last allowed call is complete (parallel_tool_calls false, or a named tool); strict also "
        "ends it at a call that its tool's schema cannot allow any more. Default: off.",
    ),
    Option(
        "verify_tokens",
        _within(0.0, 1.0),
        "a number from 0 to 1",
        "Share of the incrementally tokenized prompts that are tokenized in full as well, in "
        "the background; one difference turns the feature off. Default: 0.01.",
    ),
    Option(
        "render_bytes",
        _bytes,
        "a number of bytes (K, M, G allowed)",
        "Memory for remembered prompts in each API server; a prompt of 100k tokens takes about "
        "1.2M. Default: 1G.",
    ),
    Option(
        "base_bytes",
        _bytes,
        "a number of bytes (K, M, G allowed)",
        "Memory for remembered prompts in each engine core, so that only what is new has to be "
        "sent. Default: 512M.",
    ),
    Option(
        "response_cache_bytes",
        _bytes,
        "a number of bytes (K, M, G allowed)",
        "Memory for whole answers in each API server: a request that equals an earlier one, or "
        "one in flight, is answered without the model, if it is greedy or has a seed. "
        "Default: 0, nothing is remembered.",
    ),
    Option(
        "attention",
        _one_of("off", "auto", "on"),
        "'off', 'auto' or 'on'",
        "Who attends from short chunks of new tokens to a long cache: auto takes the kernels of "
        "this package where they were built and seen to be faster, so far on x86 CPUs (chunks of "
        "up to 64); on also takes those for CUDA (2 to 512), whose speed was not measured yet, and "
        "says so where they were not built; off leaves all to vLLM. Default: auto.",
    ),
    Option(
        "drafts",
        _one_of("off", "auto", "on"),
        "'off', 'auto' or 'on'",
        "Drafts from sessions: what a session repeats is verified several tokens at once. on makes "
        "the right --speculative-config where none is given. auto makes it on an x86 CPU, for "
        "models without recurrent states; elsewhere the speed was not measured yet. Beside a "
        "drafting head (EAGLE, MTP, ...) the draft is taken that was right more often: auto does "
        "so in the engine core (model runner V1 without async scheduling), on also on the device "
        "(model runner V2). off leaves all drafts to the head. Default: auto.",
    ),
    Option(
        "explain",
        _one_of("places", "text", "off"),
        "'places', 'text' or 'off'",
        "What is remembered of each turn, to explain what it computed: places says where a history "
        "changed (token, message, kind), and nothing of what was said; text adds a few words of "
        "both histories; off remembers nothing. Default: places.",
    ),
    Option(
        "admin_key",
        _key,
        "a key",
        "One of the server's API keys (--api-key), whose holder sees the sessions and turns of all "
        "tenants. Better given as VLLM_STATEFUL_ADMIN_KEY. Default: nobody does.",
        is_secret=True,
    ),
    Option(
        "disable",
        _features,
        f"some of {', '.join(FEATURES)}, separated by commas",
        f"Leave these stages to stock vLLM: {', '.join(FEATURES)}. Default: none.",
    ),
    Option(
        "strict",
        parse_bool,
        "1 or 0",
        "Refuse to start instead of serving as stock vLLM when the plugin, the vLLM version "
        "or the model is not supported.",
        is_flag=True,
    ),
    Option(
        "check_invariants",
        parse_bool,
        "1 or 0",
        "Check after every step that free + used + pinned blocks equal the pool, and stop the "
        "engine if not. For debugging: costs time proportional to the pool.",
        is_flag=True,
    ),
)


def is_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process runs with the plugin on.

    Raises:
        ConfigError: the variable is set to something that is neither on nor off.
    """
    text = environ.get(ENABLE_ENV, "")
    try:
        return parse_bool(text)
    except ValueError:
        raise ConfigError(f"{ENABLE_ENV}={text!r}: must be 1 or 0") from None


def load_config(environ: Mapping[str, str] = os.environ) -> StatefulConfig:
    """Build the configuration from the environment.

    Raises:
        ConfigError: a value is not allowed, or a ``VLLM_STATEFUL_*`` variable does not exist.
    """
    known = {option.env: option for option in OPTIONS}
    prefix = f"{ENABLE_ENV}_"
    unknown = sorted(key for key in environ if key.startswith(prefix) and key not in known)
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such option; there are {', '.join(sorted(known))}")
    values = {
        option.field: option.read(environ[key], key)
        for key, option in known.items()
        if key in environ
    }
    return StatefulConfig(**{**PROFILES[values.get("profile", "exact")], **values})


def set_by_profile(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the profile has set: values by the names of the fields, without those that are given."""
    profile = load_config(environ).profile
    given = {option.field for option in OPTIONS if option.env in environ}
    return {name: value for name, value in PROFILES[profile].items() if name not in given}


@lru_cache(maxsize=1)
def process_config() -> StatefulConfig:
    """The options of this process. The environment is read once.

    Whoever changes the environment later calls ``process_config.cache_clear()``, as `write_option`
    does.
    """
    return load_config()


def write_option(option: Option, text: str) -> None:
    """Set an option for this process and for the processes that it starts.

    Args:
        option: which one.
        text: a value that is allowed.
    """
    os.environ[option.env] = text
    process_config.cache_clear()

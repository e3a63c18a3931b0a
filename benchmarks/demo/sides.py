# SPDX-License-Identifier: Apache-2.0
"""The servers that are compared: what each one is called, and started with."""

import json

STOCK, EXACT, FAST, NGRAM = "stock", "exact", "fast", "ngram"

_PLUGIN = ("--plugin", "stateful")
_NGRAM_CONFIG = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 5,
}

ARGUMENTS: dict[str, tuple[str, ...]] = {
    STOCK: (),
    EXACT: _PLUGIN,
    FAST: (*_PLUGIN, "--stateful-profile", "fast"),
    NGRAM: ("--speculative-config", json.dumps(_NGRAM_CONFIG)),
}
"""What `vllm serve` gets beside what all have in common. `ngram` is stock with its own drafts."""

DEFAULT = (STOCK, EXACT, FAST)
WITH_PLUGIN = frozenset((EXACT, FAST))
COLORS = {STOCK: "#8a8f98", EXACT: "#1f6feb", FAST: "#1a7f37", NGRAM: "#c69026"}

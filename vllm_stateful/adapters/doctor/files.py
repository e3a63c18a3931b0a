# SPDX-License-Identifier: Apache-2.0
"""Says whether the KV that an offload tier writes to files is found again after a restart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm_stateful.adapters.engine.connectors import parts_of
from vllm_stateful.cli.findings import Finding

OURS, STOCK = "SessionFiles", "fs"
SEED_ENV = "PYTHONHASHSEED"


def file_findings(connector: Any, hash_algorithm: str) -> Iterator[Finding]:
    """One finding if there are files; none without.

    Args:
        connector: an instance of the connector that was never initialized.
        hash_algorithm: of ``--prefix-caching-hash-algo``.
    """
    kinds = {kind for part in parts_of(connector) for kind in _kinds_of(part)}
    if not kinds & {OURS, STOCK}:
        return
    if hash_algorithm.startswith("xxhash") and SEED_ENV not in os.environ:
        text = f"lost at a restart: {hash_algorithm} draws new hashes in each process. "
        yield Finding("files", "warn", f"{text}Set {SEED_ENV}, or use sha256")
    elif STOCK in kinds:
        text = "kept over a restart, but new weights under the same name read the KV of the old"
        yield Finding("files", "warn", f"{text}: use {OURS} (docs/restart.md)")
    else:
        yield Finding("files", "ok", "kept over a restart, for these weights")


def _kinds_of(connector: Any) -> Iterator[str]:
    tiers = connector._kv_transfer_config.get_from_extra_config("secondary_tiers", None)
    for tier in tiers or ():
        yield str(tier.get("type"))

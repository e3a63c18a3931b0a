# SPDX-License-Identifier: Apache-2.0
"""Sessions' KV in files that outlive the server: vLLM's file tier, for one set of weights.

vLLM loads it by its path, without a patch::

    "secondary_tiers": [{"type": "SessionFiles", "root_dir": "/var/lib/vllm-kv",
                         "module_path": "vllm_stateful.adapters.session_files"}]

vLLM's own tier writes and reads the files. It takes a model for the same if it has the same name.
Here each set of weights has a folder of its own (`engine.kv_origin`), and only the server's user
may read it. A file that is too short fails when vLLM reads it, one file in each try, and is not
written again before. So files that are not whole are removed at the start.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from vllm_stateful.adapters.engine.kv_origin import configuration, digest_of, kv_facts

logger = init_logger("vllm.stateful")

FACTS_FILE = "served.json"
"""What the KV in a folder depends on, for people."""

PART_S = 3600.0
"""After so many seconds nobody writes a file's first part any more: its server was killed."""


class SessionFiles(FileSystemTierManager):  # type: ignore[misc]
    """vLLM's file tier in a folder for exactly these weights and this layout.

    Args:
        offloading_spec: of the tier.
        primary_kv_view: the tier's memory; a row for each chunk.
        tier_type: the name of the tier in metrics.
        root_dir: the folders are made here.
        weights: the operator's own name of the weights, for weights that lie in no folder.
        options: those of vLLM's file tier.

    Raises:
        ValueError: no scheduler of the plugin is being built, or the weights cannot be told.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        root_dir: str,
        weights: str | None = None,
        **options: Any,
    ) -> None:
        config = configuration()
        if config is None:
            raise ValueError('SessionFiles needs --plugin stateful. vLLM\'s own tier is "fs"')
        folder = prepared(Path(root_dir), kv_facts(config, weights))
        super().__init__(
            offloading_spec, primary_kv_view, tier_type, root_dir=str(folder), **options
        )
        logger.info("stateful: the KV of sessions is kept in %s", folder)
        mapper = self.file_mapper
        # Beside it lie the files of other sizes of blocks, maybe of servers that run.
        sweeping = (Path(f"{mapper.base_path}_r{mapper.rank}"), self.block_size_bytes)
        threading.Thread(target=_sweep, args=sweeping, name="session-files", daemon=True).start()


def prepared(root: Path, facts: dict[str, Any]) -> Path:
    """The folder for these facts, with a note of them. Only its owner may look into it."""
    folder = root / digest_of(facts)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    note = folder / FACTS_FILE
    if not note.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:
            part.write(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        Path(part.name).replace(note)
    return folder


def remove_broken(folder: Path, size: int, now_s: float) -> tuple[int, int]:
    """Remove files that are not whole: of another length, or begun and never ended.

    Args:
        folder: looked through with all folders below.
        size: of a whole file, in bytes.
        now_s: the time, as the file system has it.

    Returns:
        How many were removed, and how many are left.
    """
    num_removed = num_left = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                stat = path.stat()
                is_part = name.endswith(".tmp") and stat.st_mtime < now_s - PART_S
                if is_part or (name.endswith(".bin") and stat.st_size != size):
                    path.unlink()
                    num_removed += 1
                else:
                    num_left += name.endswith(".bin")
            except FileNotFoundError:  # another server with this folder was faster
                continue
    return num_removed, num_left


def _sweep(folder: Path, size: int) -> None:
    try:
        num_removed, num_left = remove_broken(folder, size, time.time())
    except OSError as error:
        logger.warning("stateful: files that are not whole were left in %s: %s", folder, error)
        return
    if num_removed:
        logger.warning("stateful: %d files that were not whole were removed", num_removed)
    logger.info("stateful: %d blocks of KV are in files", num_left)

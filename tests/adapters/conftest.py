# SPDX-License-Identifier: Apache-2.0
"""Tests in this folder drive vLLM's own scheduler; they skip, saying so, where vLLM is absent."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_STATEFUL_CHECK_INVARIANTS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from recorded_engine import Engine
from response_client import counts as counts
from serve_parser import fresh_process as fresh_process
from serve_parser import parse as parse
from serve_parser import parser as parser


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"num_blocks": 41, "async_scheduling": request.param}


@pytest.fixture
def engine(options: dict[str, Any]) -> Iterator[Engine]:
    engine = Engine(**options)
    yield engine
    engine.run()
    engine.check_nothing_is_lost()

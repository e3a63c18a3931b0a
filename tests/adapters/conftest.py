# SPDX-License-Identifier: Apache-2.0
"""Tests in this folder drive vLLM's own scheduler; they skip, saying so, where vLLM is absent."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_STATEFUL_CHECK_INVARIANTS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

# SPDX-License-Identifier: Apache-2.0
"""Stateful agent sessions for vLLM: a turn costs only what is new in it.

Importing this package loads neither vLLM nor torch. The parts that load vLLM are in
``vllm_stateful.adapters`` and ``vllm_stateful.compat``.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"

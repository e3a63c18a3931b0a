# SPDX-License-Identifier: Apache-2.0
"""Stateful agent sessions for vLLM: a turn costs what is new in it.

Importing this package loads neither vLLM nor torch. The parts that do live in
``vllm_stateful.adapters`` and ``vllm_stateful.compat``.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"

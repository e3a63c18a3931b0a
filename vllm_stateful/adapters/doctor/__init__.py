# SPDX-License-Identifier: Apache-2.0
"""Asks vLLM for ``vllm-stateful doctor``, in a process that serves nobody."""

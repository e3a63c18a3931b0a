# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-stateful doctor`` asks vLLM, in a process that serves nobody."""

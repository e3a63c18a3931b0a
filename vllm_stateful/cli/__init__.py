# SPDX-License-Identifier: Apache-2.0
"""The commands ``vllm-stateful doctor | explain | top``, which run beside a server."""

# SPDX-License-Identifier: Apache-2.0
"""Commands beside a server: ``vllm-stateful doctor | explain | top``."""

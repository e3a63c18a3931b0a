# SPDX-License-Identifier: Apache-2.0
"""Patches for what vLLM has no official seam for: few and small, each checked and undoable."""

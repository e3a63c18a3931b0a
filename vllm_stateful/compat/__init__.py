# SPDX-License-Identifier: Apache-2.0
"""What vLLM has no official seam for: few small patches, each checked, undoable and dated."""

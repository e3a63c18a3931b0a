# SPDX-License-Identifier: Apache-2.0
"""What a turn computes on each family of models: stock vLLM, stock at its best, the plugin."""

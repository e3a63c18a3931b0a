# SPDX-License-Identifier: Apache-2.0
"""Three agents, five turns each, against stock vLLM and against the plugin."""

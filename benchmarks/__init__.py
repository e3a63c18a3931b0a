# SPDX-License-Identifier: Apache-2.0
"""Measurements of the plugin against stock vLLM, and the models they run on."""

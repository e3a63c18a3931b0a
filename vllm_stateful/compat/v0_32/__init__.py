# SPDX-License-Identifier: Apache-2.0
"""The patches for vLLM 0.32, one symptom a file. A patch only opens a hook; adapters fill it."""

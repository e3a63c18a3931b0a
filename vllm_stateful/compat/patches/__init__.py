# SPDX-License-Identifier: Apache-2.0
"""The patches, one symptom a file. A patch only opens a hook; adapters fill it.

All fit every series of vLLM that is supported. What differs between two series is what adapters use
(``compat/v*/shapes.json``).
"""

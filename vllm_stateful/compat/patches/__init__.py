# SPDX-License-Identifier: Apache-2.0
"""The patches, by the process that they run in.

All fit every series of vLLM that is supported. What differs between two series is what adapters use
(``compat/v*/shapes.json``).
"""

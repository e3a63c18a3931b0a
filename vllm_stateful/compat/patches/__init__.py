# SPDX-License-Identifier: Apache-2.0
"""The patches, in one module for each process or purpose.

All patches fit every supported series of vLLM. Only what the adapters use differs between series
(``compat/v*/shapes.json``).
"""

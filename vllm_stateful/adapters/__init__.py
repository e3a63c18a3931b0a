# SPDX-License-Identifier: Apache-2.0
"""The glue to vLLM: with ``compat`` the only code that imports it."""

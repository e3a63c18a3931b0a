# SPDX-License-Identifier: Apache-2.0
"""The glue to vLLM. Only this package and ``compat`` import vLLM."""

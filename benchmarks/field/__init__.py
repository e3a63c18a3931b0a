# SPDX-License-Identifier: Apache-2.0
"""The field's own yardsticks, run against stock vLLM and the plugin in turn."""

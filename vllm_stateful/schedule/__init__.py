# SPDX-License-Identifier: Apache-2.0
"""Who keeps its KV while it waits, and who gives it back first."""

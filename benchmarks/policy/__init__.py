# SPDX-License-Identifier: Apache-2.0
"""Which sessions to keep: recorded request times replayed against retention policies."""

# SPDX-License-Identifier: Apache-2.0
"""Counts what happened to each turn, for the metrics."""

# SPDX-License-Identifier: Apache-2.0
"""Renders messages to text and tokenizes it, at the cost of the new messages only."""

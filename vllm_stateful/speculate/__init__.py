# SPDX-License-Identifier: Apache-2.0
"""Drafts from what an agent has already seen and said."""

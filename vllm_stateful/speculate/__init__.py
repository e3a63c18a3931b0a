# SPDX-License-Identifier: Apache-2.0
"""Drafts tokens from what an agent has already seen and said."""

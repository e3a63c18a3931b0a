# SPDX-License-Identifier: Apache-2.0
"""Drafts on recorded text."""

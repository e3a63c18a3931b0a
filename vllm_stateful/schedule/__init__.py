# SPDX-License-Identifier: Apache-2.0
"""Decides which sessions keep their KV while they wait, and which give it back first."""

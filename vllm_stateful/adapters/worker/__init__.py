# SPDX-License-Identifier: Apache-2.0
"""The adapters that run in the workers."""

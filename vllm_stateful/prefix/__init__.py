# SPDX-License-Identifier: Apache-2.0
"""Which KV is already here: residencies, the index over their tokens, the pin ledger."""

# SPDX-License-Identifier: Apache-2.0
"""Messages to text to token ids, at the cost of what is new in them."""

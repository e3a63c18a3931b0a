# SPDX-License-Identifier: Apache-2.0
"""What the three agents may call: the schemas and the local functions behind them."""

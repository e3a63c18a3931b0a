# SPDX-License-Identifier: Apache-2.0
"""How the plugin bears long, broken and hostile use."""

# SPDX-License-Identifier: Apache-2.0
"""What a turn costs before its first token, against the length of the conversation."""

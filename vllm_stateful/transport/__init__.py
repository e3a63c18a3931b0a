# SPDX-License-Identifier: Apache-2.0
"""From the API process to the engine core: a base that the engine holds, and what is new."""

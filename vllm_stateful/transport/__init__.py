# SPDX-License-Identifier: Apache-2.0
"""Sends prompts from the API process to the engine core as a base that it holds and new ids."""

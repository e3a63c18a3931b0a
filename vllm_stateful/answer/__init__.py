# SPDX-License-Identifier: Apache-2.0
"""Checks answers while they are generated, and answers requests without the model."""

# SPDX-License-Identifier: Apache-2.0
"""The attention kernels alone, against those that vLLM has."""

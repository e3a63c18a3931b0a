# SPDX-License-Identifier: Apache-2.0
"""Delta append attention: the plan of a step, its kernels, and what they are tested against."""

# SPDX-License-Identifier: Apache-2.0
"""Delta append attention: the plan of a step, the kernels, and an oracle to test them against."""

# SPDX-License-Identifier: Apache-2.0
"""What a machine with a GPU would miss, found on one without: see benchmarks/gpu/rehearse.sh."""

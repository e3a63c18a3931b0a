# SPDX-License-Identifier: Apache-2.0
"""What is to be run on a GPU, in one command: benchmarks/gpu/run.sh."""

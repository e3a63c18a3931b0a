# SPDX-License-Identifier: Apache-2.0
"""What is to be run on a GPU, in three commands: benchmarks/gpu/run.sh."""

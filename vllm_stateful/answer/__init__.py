# SPDX-License-Identifier: Apache-2.0
"""What is done with an answer while it is generated, and what is answered without the model."""

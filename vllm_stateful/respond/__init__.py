# SPDX-License-Identifier: Apache-2.0
"""What is answered without the model: the same request again."""

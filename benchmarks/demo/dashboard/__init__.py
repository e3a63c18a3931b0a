# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard against a real Prometheus: which panels show something."""

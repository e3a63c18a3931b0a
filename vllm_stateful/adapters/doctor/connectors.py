# SPDX-License-Identifier: Apache-2.0
"""Makes KV connectors to examine, and never starts them: a start opens ports, files and pools."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from vllm_stateful.adapters.engine.connectors import MULTI


def stand_in(config: Any) -> Any:
    """An object of the connector's class that was never initialized.

    `unsupported_connector` reads only its class, its configuration and its parts.

    Args:
        config: vLLM's configuration, with a ``kv_transfer_config``.

    Raises:
        ValueError: vLLM knows no such connector.
        ImportError: something that the connector needs is not installed.
    """
    return _uninitialized(KVConnectorFactory.get_connector_class(config.kv_transfer_config), config)


def _uninitialized(kind: Any, config: Any) -> Any:
    made = object.__new__(kind)
    made._kv_transfer_config = config.kv_transfer_config
    if (kind.__module__, kind.__qualname__) == MULTI:
        parts = kind._get_connector_classes_and_configs(config)
        made._connectors = [_uninitialized(*part) for part in parts]
    return made

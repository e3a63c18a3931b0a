"""Two replicas with the plugin under Ray Serve LLM. Every turn of a session goes to one of them.

    serve run ray_serve:build model=MODEL

Ray hashes the header X-Session-ID.
"""

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.llm import LLMConfig, build_openai_app


def build(arguments: dict[str, Any]) -> Any:
    """The application; `arguments` are the model, and fields of `LLMConfig` in place of ours."""
    model = arguments.pop("model")
    fields = {
        "model_loading_config": {"model_id": model, "model_source": model},
        "engine_kwargs": {"enable_prefix_caching": True, "enable_prompt_tokens_details": True},
        "runtime_env": {"env_vars": {"VLLM_STATEFUL": "1"}},
        "deployment_config": {
            "num_replicas": 2,
            "request_router_config": RequestRouterConfig(request_router_class=ConsistentHashRouter),
        },
    }
    return build_openai_app({"llm_configs": [LLMConfig(**(fields | arguments))]})

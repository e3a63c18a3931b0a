#!/bin/sh
# vLLM's router in front of several replicas: every turn of a session goes to one of them.
# It hashes X-Session-ID. Change the two addresses below.
exec vllm-router \
    --host 127.0.0.1 --port 8000 \
    --worker-urls http://127.0.0.1:8001 http://127.0.0.1:8002 \
    --policy consistent_hash \
    --worker-startup-check-interval 2 \
    --health-check-interval-secs 5 --health-failure-threshold 2 \
    --prometheus-port 29000

"""vLLM's layers served from the registry. See docs/vllm.md."""

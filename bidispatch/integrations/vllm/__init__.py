"""vLLM's layers served from the registry. See docs/vllm.md.

mode: off, on or strict. compat: every private seam, by version, read in vLLM's sources before anything is imported.
plugin: the entry point, and what is patched when. patches: putting seams in place, and back. linear, norms, moe: which
layers are served, and the methods that take vLLM's place. ops: the opaque torch ops that they call. adopt: a built
model's layers, each with what serves it. table: what is shown of that. from_config: the same of a config.json.

Attention: attention, mla, metadata, cache, kernels, limits, problems, backends.
"""

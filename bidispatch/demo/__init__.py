"""A small decoder served by continuous batching, to see whether a request's logprobs move with its neighbours.

config: what a Qwen3 or Llama model is. weights: random ones, or a safetensors folder's. model: the decoder.
kernels: what does its sums, stock torch or a plan. scheduler and engine: continuous batching over a paged KV cache.
workload: the requests. compare: each request alone against the same request among the others.
"""

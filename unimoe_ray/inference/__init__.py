"""Generation: continuous batching over a KV cache, from soft tokens. Knows neither Ray nor HTTP."""

"""What runs in vLLM's environment, as the package ``unimoe_vllm``: standard library, NumPy, torch and vLLM only."""

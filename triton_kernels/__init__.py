"""Triton kernels of mod_fused, installed as `mod_fused.triton_kernels` (pyproject.toml maps it)."""

# OpenAI's package, which vLLM imports, is also called triton_kernels: never stand in for it.
if __name__ != "mod_fused.triton_kernels":
    raise ImportError(
        f"these are the Triton kernels of mod_fused, imported as {__name__!r}: import "
        "mod_fused.triton_kernels instead; if OpenAI's triton_kernels was meant, remove this "
        "folder's parent from sys.path (it is there when Python runs in mod_fused's repository)"
    )

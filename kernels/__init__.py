"""Fused Triton kernels, one op a file; dispatch.py decides which of them run."""

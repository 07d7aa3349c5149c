"""Fused Triton kernels, one op a file; ops.py decides whether they run, reference.py has the same in PyTorch."""

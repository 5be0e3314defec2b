"""The Triton kernels: one file per operation, imported only when one of them is launched or compiled.

A file gives its kernels, the functions that launch them on plain tensors, and ``variants()``: every configuration
that the launchers choose from. ``python -m sparselora_kernels.aot`` compiles them all without a GPU.
"""

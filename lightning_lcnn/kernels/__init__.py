"""How it runs: custom autograd functions, fused and compiled kernels, recomputation, shards, what depends on the mode.

Below ``functional``, which says what is computed. Where a kernel differentiates a formula by hand, the formula stands
here, beside its derivative.
"""

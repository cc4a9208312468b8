"""How a plan is carried out: kernels and lowerings of the fused operators."""

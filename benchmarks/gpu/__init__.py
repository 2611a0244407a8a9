"""What `scripts/gpu_check` runs: the CUDA and triton kernels built, tested and measured on the machine at hand."""

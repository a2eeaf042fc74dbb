"""What runs: semantic ops and their kernels, index tables of a mask, the cost model, the cache and the executor."""

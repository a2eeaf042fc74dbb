"""Ops that have several kernels: which is the fastest is measured once for a shape, and remembered."""

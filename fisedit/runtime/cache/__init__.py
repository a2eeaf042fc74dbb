"""Recorded feature maps."""

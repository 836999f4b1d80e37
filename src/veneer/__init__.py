"""Veneer: low-rank adaptation of large models on one ordinary machine."""

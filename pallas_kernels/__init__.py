"""Kernels: single-device operations that know nothing of models."""

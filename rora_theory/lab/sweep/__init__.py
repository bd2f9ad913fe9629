"""Sweeps of fine-tuning and scoring over methods, ranks, learning rates and seeds."""

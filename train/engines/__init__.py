"""What computes a step: one module for each engine."""

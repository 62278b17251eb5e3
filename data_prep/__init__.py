"""Text to tokens on disk. Knows no model."""

"""Many machines, many runs."""

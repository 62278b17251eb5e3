"""unit: one process; distributed: gloo, 2 to 4 processes; e2e: the commands a user types."""

"""What leaves the process about an exchange, and what must not."""

"""One rule per file; none imports another."""

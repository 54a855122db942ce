"""Small whole services that use the library, each with its test."""

"""What the stack knows of the frameworks it serves."""

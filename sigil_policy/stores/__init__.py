"""What outlives an exchange, behind protocols."""

"""What other systems need: each one small file."""

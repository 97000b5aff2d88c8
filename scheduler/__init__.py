"""What runs when, and on how many nodes."""

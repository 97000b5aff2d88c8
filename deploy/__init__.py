"""How a fleet comes to be: today all of it on one machine."""

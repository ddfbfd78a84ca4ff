"""Settings that another module of the user's reads."""

SCALE = 1.0

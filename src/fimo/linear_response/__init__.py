"""Predicting further training: linear response of full runs to leaving instances out, and what it misses."""

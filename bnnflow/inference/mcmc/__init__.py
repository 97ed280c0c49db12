"""Markov chains that follow the full gradient, and how they tune themselves."""

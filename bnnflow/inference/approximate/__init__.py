"""Approximations and point estimates that people compare with: Laplace, variational, SWAG,
ensembles, dropout.
"""

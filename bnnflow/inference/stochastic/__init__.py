"""Stochastic-gradient Markov chains: `SGLD`, `SGHMC`, `SGNHT`, their step-size schedules and
burn-in.
"""

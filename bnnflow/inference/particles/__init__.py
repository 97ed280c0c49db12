"""What needs only particles and the model: `SMC`, `evidence` and `refine`."""

"""The loop that ships: it uses the public Engine and nothing else."""

"""What a run's state is, and how it is published so that it is complete or absent."""

"""What scripts/bench_against.py compares: training the same model in several ways, each in a process of its own."""

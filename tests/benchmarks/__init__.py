"""What the trainer costs, measured: `python -m tests.benchmarks` runs all that a processor can show."""

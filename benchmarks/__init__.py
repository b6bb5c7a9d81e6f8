"""What the speed claims are measured with; the results lie in `results/`."""

"""The GPU benchmark: `benchmarks/gpu.sh`, or `python -m benchmarks.gpu` where everything is installed."""

"""What all benchmarks share: servers as processes, and the description of the machine."""

"""The coordinator: the master of runs. It keeps the workers' leases and drives iterations; tokens never pass it."""

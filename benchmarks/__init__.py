"""Side-by-side measurements; run from the repository's root, e.g. ``python -m benchmarks.forward --quick``."""

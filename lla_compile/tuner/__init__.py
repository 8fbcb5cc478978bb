"""The autotuner: searches plans for the keys of a grid and writes the winners into the tuning database."""

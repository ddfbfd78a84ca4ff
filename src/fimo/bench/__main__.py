"""``python -m fimo.bench``: the same as ``fimo bench``."""

from fimo.bench.command import console

if __name__ == "__main__":
    console()

"""``python -m fimo.store``: as ``fimo store``."""

from fimo.store.inventory import console

if __name__ == "__main__":
    console()

"""``python -m fimo``: the same as the console command ``fimo``."""

from fimo.app.command import console

if __name__ == "__main__":
    console()

"""``python -m src.run``: compose the configuration from ``conf``, run the experiment."""

from pathlib import Path

from fimo.app.command import main

if __name__ == "__main__":
    main(Path(__file__).parents[1] / "conf")

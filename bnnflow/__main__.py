"""``python -m bnnflow`` is the command ``bnnflow``."""

from bnnflow.cli import app

if __name__ == "__main__":
    app(prog_name="bnnflow")

"""``python -m fisedit``: the command line."""

from fisedit.cli import app

app(prog_name="fisedit")

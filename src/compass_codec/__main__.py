"""``python -m compass_codec`` is the ``compass`` command."""

from compass_codec.cli import run

run()

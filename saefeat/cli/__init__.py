"""The command `saefeat`: what its commands take (`commands`), and how a call is made (`main`)."""

from saefeat.cli.commands import COMMANDS
from saefeat.cli.main import main

__all__ = ["COMMANDS", "main"]

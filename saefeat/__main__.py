"""`python -m saefeat` is the command `saefeat`."""

from saefeat.cli import main

main()

"""`python -m pipelines.cli` is `scsae`."""

from pipelines.cli.app import main

main()

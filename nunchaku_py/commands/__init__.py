"""One file per command of the command line: `add(subparsers)` declares it, `run(args)` does it. Both import only the
standard library at the top, so that `--help` answers at once."""

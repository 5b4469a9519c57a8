"""The command line: ``rqgen --help``."""

"""The command line: here, and only here, the rooms below are put together."""

"""The peer process: I/O shells around the protocol cores. Never imports torch."""

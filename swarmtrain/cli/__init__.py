"""The command line: thin commands over the peer process and its control socket."""

"""The web dashboard: reads a control socket, decides nothing."""

"""Models of the specifications, small enough to look at every state. Not derived from the code."""

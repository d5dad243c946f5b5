"""The wire: sans-I/O cores and numeric codecs. No clock, no socket, no thread, no torch."""

PROTOCOL_VERSION = 1

"""The deterministic simulator: the cores, driven from one seed in virtual time.

It is not a mock: the same cores run here and on real sockets; only the operating system is missing.

- ``world.World`` owns the clock, the event heap and the hosts,
- ``network`` and ``transfers`` move messages and chunks through seeded trouble,
- ``disk`` loses what was not synced, ``faults`` is the schedule of trouble as plain data,
- ``checkers`` watch, ``trace`` proves that a seed replays.
"""

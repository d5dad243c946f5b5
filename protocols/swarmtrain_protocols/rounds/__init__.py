"""Rounds: plan, exchange, decide, apply; one outcome for everybody."""

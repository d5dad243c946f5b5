"""Models cut into stages, and the runtime that computes hops of them (spec 11)."""

"""The hooks for a training loop, the presets and their data. The only code that imports torch."""

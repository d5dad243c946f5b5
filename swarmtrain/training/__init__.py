"""The hooks into a training loop; the only code that imports torch."""

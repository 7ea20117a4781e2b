"""featlas: a feature atlas of neural networks."""

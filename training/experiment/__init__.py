"""Does a trained fusion help? The experiment that docs/fusion.md reports."""

"""Functions on tensors: shrink, expand and paged attention, each with its formula and a plain reference."""

"""One module per system: runs in the system's own environment and answers jobs on standard input and output."""

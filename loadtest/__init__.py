"""Load tests and measurements through the front door, on models of real shapes with random weights."""

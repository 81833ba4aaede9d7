"""The side-by-side benchmark: this server, its peers and the machine's own limit, on the same files in one run."""

"""AdapterFusion: a trained attention over adapters, its artifact, its fold into rank rows, what trains it."""

"""Put ClusteredHeadAttention nodes and their caches in the place of what was found, and write the result."""

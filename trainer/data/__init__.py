"""Reading shards in one global order, and turning them into training batches."""

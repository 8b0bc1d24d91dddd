"""What follows when a parameter changes its size in place: optimizer state, DDP's buckets, graphs."""

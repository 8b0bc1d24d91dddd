"""What the backward passes add up for each module."""

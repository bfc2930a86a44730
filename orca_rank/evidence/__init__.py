"""Which rank rule to believe: what to run, how to compare it, and the verdict in words. Plain values only."""

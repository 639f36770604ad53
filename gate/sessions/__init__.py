"""Sessions: engines timed in fresh processes, one after another."""

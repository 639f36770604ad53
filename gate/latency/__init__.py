"""Latency: how it is to be measured, and what follows from what was measured. Pure: nothing here runs an engine."""

"""The steps of a check, called in order by gate.pipeline."""

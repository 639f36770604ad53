"""What the gate itself costs: ratios to something measured in the same run."""

"""Reports: one file per format. They show what gate.results holds and decide nothing."""

"""PyTorch: the runner of the reference, and engines that PyTorch itself compiles and runs."""

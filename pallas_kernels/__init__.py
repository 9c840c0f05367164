"""GPU kernels in Pallas, one file each. They know arrays, nothing of the model."""

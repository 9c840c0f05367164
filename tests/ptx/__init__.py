"""The sm_100 kernels, compiled to PTX and executed on the CPU."""

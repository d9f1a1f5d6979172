"""Kernels like those of other projects, written anew, to be measured beside ours."""

"""Compiled kernels for CPUs: at first use, by the machine's own compiler; who calls them has another way, too."""

"""Times of kernels on a GPU that need not be there: from their machine code and the device's data sheet."""

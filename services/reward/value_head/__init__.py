"""A language model with a scalar head that tells right responses from wrong ones: training, files, serving."""

"""Autoencoders run tile by tile with the result of the whole, in a stated amount of memory."""

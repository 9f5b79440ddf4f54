"""Weights in blocks of 4 and 8 bits, as the operator MatMulNBits reads them."""

"""Quantizing a model without ever holding it: 16-bit weights are read tensor by tensor, whatever file they lie in."""

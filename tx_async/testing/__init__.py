"""Shipped fakes and tiny models: part of the product, used by our own tests first."""

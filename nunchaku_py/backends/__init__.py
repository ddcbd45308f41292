"""Implementations of the ops beside their references; importing a module here registers what it implements."""

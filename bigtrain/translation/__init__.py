"""Configurations of other libraries as recipes, and what of them has no counterpart. No torch."""

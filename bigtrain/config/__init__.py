"""Recipes: every key once, read strictly, with file and line in each error."""

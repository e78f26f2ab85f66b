"""Tokens out of a trained decoder: keys and values kept, each next token chosen."""

"""From a recipe to a plan: nothing left open, with what is known about it before it runs."""

"""The two domains of the arithmetic recipe: integer expressions and one-line functions."""

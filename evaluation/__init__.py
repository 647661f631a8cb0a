"""How a representation is judged."""

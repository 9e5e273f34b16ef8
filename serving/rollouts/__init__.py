"""How a new version of a model takes over, and what it is compared with."""

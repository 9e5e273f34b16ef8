"""The commands of this stage: they parse and print; no other module imports them."""

"""Acceptance checks: each passes or fails against servers in processes of their own; `make acceptance` runs them."""

"""Attempts to exceed a limit of the server, by kind; `tests.acceptance.limits` runs them."""

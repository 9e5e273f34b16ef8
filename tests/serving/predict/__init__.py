"""Tests of predictions without a server."""

"""Tests of `serving.rollouts`."""

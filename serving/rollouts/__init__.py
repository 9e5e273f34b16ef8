"""Proof in production: shadows compare the answers of versions, rollouts replace one by another, a guard decides."""

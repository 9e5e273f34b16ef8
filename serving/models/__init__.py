"""The models of a server: loaded and checked, found by name and version, and replaced while requests run."""

"""The models of a server: loaded and checked, held by name and version, replaced while requests run."""

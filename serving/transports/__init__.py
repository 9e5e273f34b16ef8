"""From a socket to a call, and back: what knows of gRPC and of no model."""

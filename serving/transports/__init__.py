"""From a socket to a call, and back: gRPC by two libraries. Knows no model and no protocol."""

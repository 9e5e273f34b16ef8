"""Messages to images, and probabilities to messages: what callers speak. Computes nothing and knows no socket."""

"""The served model against the Keras original: latency and throughput, side by side in one run."""

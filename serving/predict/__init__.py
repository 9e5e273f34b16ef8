"""Predictions for many images, without a server: from files, shards and tables to one file of answers."""

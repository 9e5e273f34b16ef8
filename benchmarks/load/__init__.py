"""`resnet load`: load for any server, and what the server bore."""

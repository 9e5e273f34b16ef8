"""The results of `resnet load`: a table for the terminal, and a page with charts for the browser."""

"""The tests, a file for each module that has something to hold."""

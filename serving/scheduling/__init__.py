"""From waiting requests to batches: the queue, admission, and the batcher."""

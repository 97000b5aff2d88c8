"""The same no-op for each task queue, a module each; `fill(count, results)` queues so many."""

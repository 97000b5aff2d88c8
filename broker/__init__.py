"""In Redis: how a job travels. Messages, claims, locks, leases and the index of outcomes."""

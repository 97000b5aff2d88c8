"""One node's life: start, claim, heartbeat, drain, leave."""

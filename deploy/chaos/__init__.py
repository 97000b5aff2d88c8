"""`./cohort chaos`: a fleet under faults drawn from a seed, and a checker of what came of it.

history.py   the facts that a run records
checker.py   what is wrong with a history; a function of it and of nothing else
jobs.py      the jobs: counters under keys, and keyless ones
load.py      producers
faults.py    which faults when: drawn from the seed
proxy.py     the network between Redis and everybody else
world.py     the fleet, and how each fault is done to it
harvest.py   facts read from the shared folder and from Redis when all is over
command.py   the command line
"""

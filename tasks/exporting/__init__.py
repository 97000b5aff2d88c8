"""The parts of the export job: one subject a module.

`request`    what was asked for, checked.
`columns`    what a column is, and how its values become Arrow's.
`sources`    one consistent snapshot of a database: `sqlite`, `postgres` or `generic`.
`reasons`    what went wrong with a database or S3, in words without secrets; and patience.
`state`      what the job directory remembers between runs.
`bucket`     the few S3 operations that are needed; `parts` writes Parquet through them.
`manifests`  which objects count, and which may go.
`reader`     what a reader sees.
`job`        the recipe.
"""

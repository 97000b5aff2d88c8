"""What is on the shared file system: durable files, the commit log, job directories, segments."""

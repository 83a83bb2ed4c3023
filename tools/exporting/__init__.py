"""What `tools.export` is made of: the files of each library."""

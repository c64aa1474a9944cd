"""What any program needs, whatever it computes: commands, files, processes, the records of a run.
Nothing here knows a method, a dataset or a sound."""

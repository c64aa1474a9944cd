"""What any program needs, whatever it computes: commands, files, processes, the records of a run.
No method, dataset or sound is made here; variants.py and console.py know some by name."""

"""The command line: `ballad COMMAND ...`, or `python -m ballad_hf COMMAND ...`."""

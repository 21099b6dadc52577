"""The configuration of a run: one YAML file, overrides on the command line, checks across its sections.

`run.py` holds RunConfig and reads, checks and prints it; `section.py` is the base of each section. A section
itself lies in the `config.py` of the room that reads it, and those files are all that this room imports of
others. Nothing here loads torch. Begin with RunConfig in run.py; the shipped runs are
llama_mcore/configs/*.yaml.
"""

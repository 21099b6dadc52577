"""The configuration of a run: one YAML file, overrides on the command line, checks across its sections.

`schema.py` holds RunConfig, `load.py` reads it, `checks.py` finds settings that clash, `section.py` is the
base of each section, `ds_file.py` reads DeepSpeed's own file. A section itself lies in the `config.py` of the
package that reads it; those files and the root's are all that this package imports. Nothing here loads torch.
Begin with schema.py; the shipped runs are llama_mcore/configs/*.yaml.
"""

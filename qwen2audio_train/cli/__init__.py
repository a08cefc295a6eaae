"""From a command line to a checked config, and from an error to a message: what the scripts of launch/ share.

In: the words of a command line, and the YAML files under recipes/. Out: a config object of the schema, or an exit
status with a message that says how to mend it. This is the one place that knows Hydra. May import: the ground floor.
"""

"""What a recipe may say.

In: the YAML that Hydra has composed. Out: one checked dataclass (`StageConfig`, `RecipeConfig`, ...), or a ConfigError
that names the key and the nearest right one. `combinations` is the one table of what goes together.
Imports nothing of the project but itself.
"""

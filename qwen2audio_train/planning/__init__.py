"""Before anything is loaded: parameters, FLOPs, memory, time and cost of a recipe, and the largest pack that fits."""

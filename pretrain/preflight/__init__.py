"""Is this cluster fit for the run? Every node is checked before hours of it are spent; failures name their node."""

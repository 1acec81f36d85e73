"""Neural networks in JAX, on plain arrays without SpatialData."""

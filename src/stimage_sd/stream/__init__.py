"""Run functions over the tiles of lazy images: driver, dask graph, cutting, results."""

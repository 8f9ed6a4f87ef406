"""The data of a run: image folders become buckets, buckets become batches, and the sampler says which comes next."""

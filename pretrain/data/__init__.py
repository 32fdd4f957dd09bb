"""Shards become samples, samples become views, views become batches."""

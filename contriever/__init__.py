"""Contriever: unsupervised dense retrieval."""

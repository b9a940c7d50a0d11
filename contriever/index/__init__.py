"""Passages, their vectors on the disk, and the indexes that find them: by inner products (faiss), by words (BM25)."""

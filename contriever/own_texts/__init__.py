"""Search in a folder of texts of your own: its passages, the index in one file, the page in the browser."""

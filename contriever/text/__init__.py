"""Raw text: files, tokens, normalisation, words of answers."""

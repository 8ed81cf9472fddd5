"""Row numbers of the n-grams of a text: hashing of each model family, histories of sequences, token compression."""

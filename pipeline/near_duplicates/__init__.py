"""How alike two texts are: n-grams, hashes, signatures, Jaccard. Knows no split."""

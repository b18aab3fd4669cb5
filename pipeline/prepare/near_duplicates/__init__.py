"""
How alike two texts are: word hashes, n-grams, Jaccard. It knows no split.

In: texts. Out: pairs of texts that are near. `word_hashes` and `ngrams` make numbers of words, `signatures` has
them by drop, `jaccard` finds the pairs. Who leaves is for `pipeline.prepare.decontaminate`. Open `jaccard` first.
"""

"""
Merge an adapter or trained weights into the base model: a folder that can be served.

In: a base model's folder, an adapter or trained weights. Out: a model folder in the base's dtype, with a weight file
for each of the base's. Open `step`, then `changes`: what is added to each weight.
"""

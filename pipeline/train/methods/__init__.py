"""
Full fine-tuning, GaLore and Spectrum: training the base's own weights instead of an adapter.

In: a loaded base, its files, the settings. Out: the base with some weights as float32 masters, all others frozen, and a
file of the trained ones. `choice` selects and saves the trained weights, `spectrum` ranks layers by signal-to-noise
ratio, `galore` is an optimizer on projected gradients. Open `choice` first.
"""

"""
Read `dropforge.toml` and environment variables into one checked, frozen `Settings`.

In: text from people. Out: `Settings`, or an error that names the setting and what it takes. `model` has every setting
with default and bounds; those of the steps are in `pipeline.config`, those of page, messages, executor and
Slurm's jobs in `sections`. `load` reads them. Open `model` first.
"""

"""
Several trainings in one run, as settings, as a result, and the choice among them: no training stack in here.

In: the table [train.search]. Out: what each trial is to be trained with, which of them is taken, and what is told of it
afterwards. The trainings are in `pipeline/qlora/training/search/`. Open `settings` first.
"""

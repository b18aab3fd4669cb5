"""
Several trainings in one run, as settings and as a result: no training stack in here.

In: the table [train.search]. Out: what each trial is to be trained with, and what is told of it afterwards. The
trainings are in `pipeline/qlora/training/search/`, the choice among them is `pipeline/dev_choice.py`. Open `settings`
first.
"""

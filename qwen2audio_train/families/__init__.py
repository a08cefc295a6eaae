"""What is particular to one family of audio language models, in one frozen object per family.

In: a family's name, as `model.family` or a checkpoint has it. Out: its special tokens and chat layout, its lengths, the
names of its parts. Data and plain functions; knows `layout` and `errors` only, neither torch nor transformers. The
family's modules are in `model/`, under the same name.
"""

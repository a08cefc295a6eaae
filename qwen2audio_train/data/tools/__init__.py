"""What launch/data.py runs: convert, check, chat, index, stats, shard, show.

In: the options of one command, as a dataclass. Out: files, a table, findings. May import all of `data` but `loading`.
"""

"""A page to talk to a checkpoint: by voice or in writing, several clips and turns, two checkpoints side by side.

`conversation` is the logic, without a page: what a turn holds, and the growing answer of every checkpoint. `page` shows
it with Gradio, which nothing else imports.
"""

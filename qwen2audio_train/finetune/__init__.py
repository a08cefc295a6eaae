"""Fine-tuning in one go: from a folder of recordings to a better model, its figures and its card.

In: whatever `audio=` names, and a checkpoint. `corpus` makes examples of it, `split` holds a part out, `plan` picks
steps and budget, `run` trains and scores with the scripts of launch/, `outcome` writes summary, table and model card.
"""

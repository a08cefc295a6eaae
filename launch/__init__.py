"""One short script for each thing that can be started; what they share is in `qwen2audio_train.cli`.

torchrun launch/pretrain.py [key=value ...]    from any folder; or, once installed: qwen2audio-train pretrain ...
"""

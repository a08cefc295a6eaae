"""From a clip to a log-mel spectrogram.

In: a `Clip` (path or bytes, slice, channel). Out: a 16 kHz mono waveform in float32, augmented if the recipe says so,
and its mel frames, equal to WhisperFeatureExtractor's bit for bit. An AudioError says what is wrong with a file.
"""

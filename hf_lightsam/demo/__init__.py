"""The demo: a task that the package makes itself, and ``hf-lightsam demo``, which fine-tunes an encoder on it."""

"""Model cards: of one run of the Trainer (``trainer_card``), and of a suite's runs over seeds (``results_card``).

Both go through huggingface_hub's ``ModelCard``, ``ModelCardData`` and ``EvalResult``: metadata that the hub takes.
"""

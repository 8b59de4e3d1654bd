"""The recipes, in reading order: full_sft (every weight), lora_sft (an adapter).

Each file tells one story in the same order: config, data, model, trainer, evaluation, artifact.
"""

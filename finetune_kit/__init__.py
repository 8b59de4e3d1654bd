"""finetune_kit: from a base model to an aligned one, with proof that it got better, in one command."""

import os

# Read once, when torch and the Hub's client are imported, so they must be set before either.
# OpenMP threads that spin at a barrier make a step 4 to 8 times slower as soon as another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# TRL and transformers report each trainer they build; nothing leaves the machine unless the user asks for it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

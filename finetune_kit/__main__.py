"""python -m finetune_kit"""

from finetune_kit.cli import main

main()

"""How the course models are made: every setting, and the stages in their order. `effnlp train-course-models`.

    tokenizer -> shards -> course-base -> course-draft -> figures and model card

Each stage leaves its product in the folder, whole or not at all, and is not done again; training goes on from its last
checkpoint. So the command can be stopped at any moment, and given again.
"""

# %% [markdown]
# # Lesson 6, solution: counting parameters

# %%


def exercise(config) -> int:
    size, d = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
    attention = size * queries + 2 * size * keys + queries * size
    mlp = 3 * size * config.intermediate_size
    layer = attention + mlp + 2 * size
    embedding = config.vocab_size * size
    head = 0 if config.tie_word_embeddings else embedding
    return embedding + head + config.num_hidden_layers * layer + size
